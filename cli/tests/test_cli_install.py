"""`altx install` and `uninstall`: names become packages, and nothing but pip is run; tests/test_discovery.py does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from altx.registry import default
from altx_cli import external, index
from altx_cli.commands import install as module
from altx_cli.commands.list import describe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pip(altx, monkeypatch):
    """What pip is called with; it does nothing, and ends with the status that is put in `status`."""
    calls = SimpleNamespace(arguments=[], status=0)
    listed = describe(default(), None) | {"commands": [], "problems": []}

    def run(command, check):
        assert not check and command[:4] == [sys.executable, "-P", "-m", "pip"]
        calls.arguments.append(command[4:])
        return subprocess.CompletedProcess(command, calls.status)

    monkeypatch.setattr(module, "offered", lambda: listed)
    monkeypatch.setattr(external, "packages", lambda: {"altx-toy": "1.0"})
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))
    return calls


def test_what_is_offered_is_asked_of_a_new_process(altx, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", sys.path[0])
    listed = module.offered()
    assert ("altx-toy", "average") in {(component["plugin"], component["name"]) for component in listed["components"]}
    assert ["train", "altx-lab"] in listed["commands"]


@pytest.mark.parametrize(
    "name, package",
    [
        ("mamba", "altx-mamba"),
        ("mamba2", "altx-mamba"),
        ("topk", "altx-moe"),
        ("Product_Key", "altx-product-key"),
        ("train", "altx-lab"),
        ("altx-lab", "altx-lab"),
        ("altx-of-a-stranger", "altx-of-a-stranger"),
        ("of-a-stranger", "altx-of-a-stranger"),
        ("mamba2==0.1.0", "altx-mamba==0.1.0"),
    ],
)
def test_a_name_becomes_a_package(altx, pip, name, package):
    result = altx("install", name)
    assert result.exit_code == 0, result.stderr
    assert pip.arguments == [["install", "--", package]]
    assert result.stdout.startswith(
        f"running: {shlex.join([sys.executable, '-P', '-m', 'pip'])} install -- {package}\n"
    )


@pytest.mark.parametrize(
    "name",
    ["--index-url=http://evil", "-r", "git+https://evil", "./folder", "a b", "name;sys_platform", "a==1;x", "a==", "é"],
)
@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_what_is_no_name_never_reaches_pip(altx, pip, command, name):
    result = altx(command, "--", name)
    assert result.exit_code == 2
    assert "is not the " in result.stderr
    assert pip.arguments == []


def test_a_slip_of_the_pen_installs_nobodys_package(altx, pip):
    result = altx("install", "mambo")
    assert result.exit_code == 2
    assert "did you mean 'mamba'? A package of that name is written altx-mambo" in result.stderr
    assert pip.arguments == []
    assert altx("install", "altx-mambo").exit_code == 0


def test_what_is_there_is_not_installed_again_unless_a_newer_one_is_wanted(altx, pip):
    result = altx("install", "average")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:2] == [
        "altx-toy 1.0 is installed already; for a newer one: altx install --upgrade altx-toy",
        "altx-toy offers",
    ]
    assert pip.arguments == []
    altx("install", "average", "--upgrade")
    assert pip.arguments == [["install", "--upgrade", "--", "altx-toy"]]


@pytest.mark.parametrize("status, expected", [(1, 1), (23, 23), (-9, 137)])
def test_the_exit_status_is_pips(altx, pip, status, expected):
    pip.status = status
    assert altx("install", "mamba").exit_code == expected
    assert altx("uninstall", "average", "--yes").exit_code == expected


@pytest.mark.parametrize("args", [["show", "rwkv7"], ["compose", "--mixer", "rwkv7"], ["compose", "recipe.yaml"]])
def test_what_is_not_installed_is_told_how_to_get(altx, pip, args):
    Path("recipe.yaml").write_text("blocks: [{sublayers: [{mixer: rwkv7}]}]")
    assert altx(*args).stderr.splitlines()[-1] == "  altx-rwkv offers it: altx install rwkv7"
    assert "altx install" not in altx("show", "rwkv99").stderr


def test_without_pip_it_says_how_to_get_it(altx, pip, monkeypatch, tmp_path):
    monkeypatch.setattr(module.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sys, "prefix", str(tmp_path))
    result = altx("install", "mamba")
    assert (result.exit_code, pip.arguments) == (2, [])
    assert f"there is no pip in {tmp_path}\n  get it with: {sys.executable} -m ensurepip" in result.stderr
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    assert f"uv pip install --python {sys.executable} altx-mamba" in altx("install", "mamba").stderr


def test_uninstalling_says_what_goes_and_asks_unless_told_not_to(altx, pip):
    result = altx("uninstall", "average")
    assert (result.exit_code, pip.arguments) == (2, []), "there is nobody to ask"
    result = altx("uninstall", "average", "--yes")
    lines = [line.split()[:2] for line in result.stdout.splitlines()]
    assert lines[0] == ["with", "altx-toy"]
    assert lines[1:4] == [["mixer", "average"], ["mixer", "both"], ["memory", "both"]]
    assert pip.arguments == [["uninstall", "--yes", "--", "altx-toy"]]


@pytest.mark.parametrize("name", ["swiglu", "altx"])
def test_altx_does_not_uninstall_itself(altx, pip, name):
    result = altx("uninstall", name, "--yes")
    assert (result.exit_code, pip.arguments) == (2, [])
    assert "is a part of altx itself" in result.stderr


@pytest.mark.parametrize("name", ["torch", "altx-torch", "pip"])
def test_what_is_no_plugin_is_not_uninstalled(altx, pip, name):
    result = altx("uninstall", name, "--yes")
    assert (result.exit_code, pip.arguments) == (2, [])
    assert "installed: altx-toy" in result.stderr


def test_the_index_knows_what_the_plugins_of_this_repository_offer(monkeypatch):
    monkeypatch.delenv("ALTX_PLUGINS", raising=False)
    default.cache_clear()
    offered = {}
    for component in default().components():
        offered.setdefault(component.plugin.distribution, set()).add(component.name)
    for name, points in external.offers().items():
        for point in points:
            offered.setdefault(point.distribution, set()).add(name)
    ours = re.findall(r"^-e plugins/(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    expected = {package: " ".join(sorted(offered[package])) for package in ours if package in offered}
    told = {package: index.INDEX.get(package) for package in expected}
    assert told == expected, "cli/src/altx_cli/index.py lists what each package offers"
