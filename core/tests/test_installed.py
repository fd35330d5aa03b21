"""Discovery reads metadata, which may be anything: what is wrong with a distribution is told, the rest is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from altx.discovery import discover
from altx.errors import UnknownComponent
from altx.registry import Plugin, Registry

ENTRY = """
from altx import MixerSpec, hookimpl
@hookimpl
def altx_token_mixers():
    return [MixerSpec("{name}", summary="s", build="m:b", config="m:c", capabilities="m:d")]
"""


def put(site: Path, distribution: str, version: str, points: str | bytes, metadata: str | bytes | None = None) -> Path:
    """Metadata of a distribution, as raw as need be."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    if metadata is None:
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    for name, content in (("METADATA", metadata), ("entry_points.txt", points)):
        (info / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return info


def found(name: str) -> list[Plugin]:
    return [plugin for plugin in discover(allow=None) if name in (plugin.distribution, plugin.name)]


def the(name: str) -> Plugin:
    (plugin,) = found(name)
    return plugin


@pytest.fixture
def site(tmp_path: Path, install) -> Path:
    """A folder on the path, with one good plugin."""
    install("altx-good", "1.0", {"good": "good_entry"}, good_entry=ENTRY.format(name="good"))
    return tmp_path


@pytest.mark.parametrize(
    ("points", "metadata", "reason"),
    [
        (b"\xff\xfe[altx.plugins]\nx = m\n", None, "its entry points cannot be read: UnicodeDecodeError"),
        ("[altx.plugins]\nnonsense\n", None, "its entry points cannot be read"),
        ("[altx.plugins]\nx = m\n", b"Name: altx-x\xff\n", "its metadata cannot be read: UnicodeDecodeError"),
        ("[altx.plugins]\nx = m\n", "", "its metadata names it '', which is no name"),
        ("[altx.plugins]\nx = m\n", "Name: ../../x\nVersion: 1", "names it '-/-/x', which is no name"),
        ("[altx.plugins]\nx = m\n", "Name: altx-x; rm -rf x\nVersion: 1", "which is no name of a distribution"),
        ("[altx.plugins]\nx = m\n", "Name: altx-x\n", "says that its version is '', which is none"),
        ("[altx.plugins]\nx = m\n", "Name: altx-x\nVersion: 1 --index-url x", "'1 --index-url x', which is none"),
        ("[altx.plugins]\nx = ../m.py\n", None, "its entry point '../m.py' is not 'module' or 'module:attribute'"),
        ("[altx.plugins]\nx =\n", None, "its entry point '' is not"),
        ("[altx.plugins]\nx = os:system('true')\n", None, "is not 'module' or 'module:attribute'"),
        ("[altx.plugins]\n../x = m\n", None, "has the name '../x', which is none"),
        ("[altx.plugins]\nx\x1b[2J = m\n", None, r"has the name 'x\x1b[2J', which is none"),
        ("[altx.plugins]\nx = altx.builtin\n", None, "its entry point 'altx.builtin' is a module of altx itself"),
        ("[altx.plugins]\nx = altx_cli.main:app\n", None, "'altx_cli.main:app' is a module of altx itself"),
        ("[altx.plugins]\nx = m\nx = n\n", None, "its entry point 'x' is there twice: 'm' and 'n'"),
        ("[altx.plugins]\nx = m\n", "Name: altx\nVersion: 9", "'altx' is the name of altx itself"),
    ],
)
def test_a_damaged_distribution_is_a_broken_plugin_and_hurts_nobody(site, points, metadata, reason) -> None:
    put(site, "altx-x", "1.0", points, metadata)
    broken = [plugin for plugin in discover() if reason in " ".join(plugin.errors)]
    assert len(broken) == 1, [plugin.errors for plugin in discover() if plugin.errors]
    assert broken[0].status == "broken" and broken[0].remedy
    assert all(text.isprintable() for text in (broken[0].name, broken[0].distribution, broken[0].version))
    registry = Registry()
    registry.load_all()
    assert registry.get("mixer", "good").plugin.version == "1.0"
    with pytest.raises(UnknownComponent) as caught:
        registry.get("mixer", "nobody")
    assert f"{broken[0]} did not load completely: {broken[0].errors[0]}; {broken[0].remedy}" in caught.value.hint


def test_a_distribution_that_has_nothing_to_do_with_altx_is_left_alone(site) -> None:
    put(site, "other", "1.0", "[console_scripts]\nx = m\nnonsense\n", b"Name: other\xff\n")
    assert found("other") == []
    (put(site, "empty", "1.0", "") / "METADATA").unlink()
    assert found("empty") == []


def test_two_versions_of_a_distribution_are_an_error_that_names_both(site, monkeypatch) -> None:
    other = site / "other"
    put(other, "altx-twice", "1.0", "[altx.plugins]\ntwice = good_entry\nold = good_entry\n")
    put(site, "altx_Twice", "2.0", "[altx.plugins]\ntwice = good_entry\n")
    monkeypatch.syspath_prepend(str(other))
    assert [plugin.name for plugin in found("altx-twice")] == ["old", "twice"]
    for plugin in found("altx-twice"):
        assert plugin.status == "broken"
        assert f"several versions of it are installed: 1.0 in {other} and 2.0 in {site}" in plugin.errors[0]
        assert "pip uninstall altx-twice" in plugin.remedy
    with pytest.raises(UnknownComponent, match=r"altx-twice 1\.0 did not load completely: several versions"):
        Registry().get("mixer", "altx-twice:twice")


def test_one_version_that_is_found_twice_is_one_plugin(site, monkeypatch) -> None:
    other = site / "other"
    for folder in (site, other):
        put(folder, "altx-twice", "1.0", "[altx.plugins]\ntwice = good_entry\n")
    monkeypatch.syspath_prepend(str(other))
    assert the("altx-twice").status == "not loaded"


def test_what_an_editable_install_left_in_the_source_tree_does_not_count(site) -> None:
    put(site, "altx-dev", "2.0", "[altx.plugins]\ndev = good_entry\n")
    left = site / "altx_dev.egg-info"
    left.mkdir()
    (left / "PKG-INFO").write_text("Name: altx-dev\nVersion: 1.0\n")
    (left / "entry_points.txt").write_text("[altx.plugins]\ndev = good_entry\n")
    assert the("altx-dev").version == "2.0" and the("altx-dev").status == "not loaded"


def test_one_module_cannot_be_the_plugin_of_two_distributions(site) -> None:
    put(site, "altx-copy", "1.0", "[altx.plugins]\ncopy = good_entry\n")
    registry = Registry()
    registry.load_all()
    (second,) = (plugin for plugin in registry.plugins if plugin.errors)
    assert second.distribution == "altx-good"
    assert second.errors == ["its entry point 'good_entry' is that of altx-copy:copy"]


def test_entry_points_of_one_name_from_two_distributions_both_stay(site, install) -> None:
    install("altx-other", "2.0", {"good": "other_entry"}, other_entry=ENTRY.format(name="other"))
    registry = Registry()
    assert registry.get("mixer", "other").plugin.distribution == "altx-other"
    assert registry.get("mixer", "altx-good:good").plugin.distribution == "altx-good"


def test_a_plugin_that_imports_what_is_heavy_is_known_with_the_time_it_took(site, install) -> None:
    install("altx-slow", "1.0", {"slow": "slow_entry"}, slow_entry="import time, scipy\n" + ENTRY.format(name="slow"))
    (site / "scipy.py").write_text("import time\ntime.sleep(0.05)\n")
    code = (
        "import json\nfrom altx.registry import Registry\nregistry = Registry()\nregistry.load_all()\n"
        "print(json.dumps({p.name: [p.seconds, p.heavy] for p in registry.plugins}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = json.loads(done.stdout)
    assert measured["slow"][1] == ["scipy"] and measured["slow"][0] >= 0.05
    assert measured["good"][1] == []


def test_many_plugins_are_found_and_loaded_in_a_fraction_of_a_second(tmp_path: Path) -> None:
    """The least CPU time of five processes, as other load only adds to it: 35 ms and, with loading, 95 ms where this
    was written."""
    for i in range(200):
        readme = "A plugin's description, which is its README.\n" * 200
        metadata = f"Metadata-Version: 2.1\nName: altx-many-{i}\nVersion: 1.{i}\nRequires-Dist: altx\n\n{readme}"
        put(tmp_path, f"altx-many-{i}", f"1.{i}", f"[altx.plugins]\nmany-{i} = many_{i}.plugin\n", metadata)
        package = tmp_path / f"many_{i}"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "plugin.py").write_text(ENTRY.format(name=f"many-{i}"))
    code = (
        f"import sys, time; sys.path.insert(0, {str(tmp_path)!r})\nfrom altx.registry import Registry\n"
        "a = time.process_time(); registry = Registry(); b = time.process_time(); registry.load_all()\n"
        "assert sum(p.status == 'ok' and p.name.startswith('many-') for p in registry.plugins) == 200\n"
        "print(b - a, time.process_time() - b)"
    )
    times = [
        list(map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split()))
        for _ in range(5)
    ]
    assert min(discovery for discovery, _ in times) < 0.5, times
    assert min(sum(both) for both in times) < 1.0, times
