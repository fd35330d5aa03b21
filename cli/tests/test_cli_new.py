"""A plugin that is made from the template is complete: it installs, is proved, and is as tidy as altx's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
KINDS = ("mixer", "memory", "router")


def run(*command: object, where: Path, **environment: str) -> str:
    """Run a Python module in a process of its own, without a network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plugin of each kind, and what was installed from their wheels in `site`."""
    folder = tmp_path_factory.mktemp("made")
    for kind in KINDS:
        run("altx_cli", "new", "plugin", f"try-{kind}-one", "--kind", kind, where=folder)
    sources = [folder / f"altx-try-{kind}-one" for kind in KINDS]
    run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "wheels", *sources, where=folder)
    wheels = sorted((folder / "wheels").glob("*.whl"))
    assert len(wheels) == 3
    run("pip", "install", "-q", "--no-deps", "--target", folder / "site", *wheels, where=folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_passes_what_its_ci_runs(made: Path, kind: str) -> None:
    name, folder = f"try-{kind}-one", made / f"altx-try-{kind}-one"
    workflow = yaml.safe_load((folder / ".github/workflows/test.yml").read_text())
    install, tidy, check, test = (step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step)
    assert (install, tidy) == ('pip install -e ".[test]"', "ruff check && mypy")  # the fixture and the next test
    alone = {"PYTHONPATH": str(made / "site"), "ALTX_PLUGINS": name}
    assert check == f"altx check {name}"
    if kind == "mixer":  # its conformance test runs the same checks for all three
        report = json.loads(run("altx_cli", *check.split()[1:], "--json", where=made, **alone))
        assert report["passed"] and len(report["results"]) > 30
    out = run(test, "-q", "-W", "error", "-p", "no:cacheprovider", where=folder, **alone)
    assert re.search(r"\d\d passed", out)


def test_what_is_made_is_tidy_and_typed(made: Path) -> None:
    for kind in KINDS:
        run("ruff", "check", "--no-cache", ".", where=made / f"altx-try-{kind}-one")
        run("ruff", "format", "--no-cache", "--check", ".", where=made / f"altx-try-{kind}-one")
        for file in (made / f"altx-try-{kind}-one").rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 75, file
    packages = [word for kind in KINDS for word in ("-p", f"altx_try_{kind}_one")]
    # With the repository's settings and its cache; those in a plugin's pyproject.toml say the same.
    paths = [*(str(made / f"altx-try-{kind}-one" / "src") for kind in KINDS), str(ROOT / "core/src")]
    run("mypy", *packages, where=ROOT, MYPYPATH=os.pathsep.join(paths))


def test_a_made_plugin_asks_for_this_altx_and_has_what_ours_have(made: Path) -> None:
    from altx import API_VERSION, __version__

    for kind in KINDS:
        folder = made / f"altx-try-{kind}-one"
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        ours = tomllib.loads((ROOT / "plugins/altx-hopfield/pyproject.toml").read_text())["project"]
        assert {**project, "name": "", "description": ""}.keys() >= ours.keys()
        assert project["dependencies"] == ours["dependencies"]
        assert project["dependencies"][0].startswith("altx>=" + __version__.rpartition(".")[0])
        assert f"api_version={API_VERSION},\n" in (folder / f"src/altx_try_{kind}_one/plugin.py").read_text()
        assert (folder / ".github/workflows/test.yml").exists() and (folder / ".gitignore").exists()
        text = "".join(file.read_text() for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc")
        assert not re.search(r"\$(?!\{\{)|PACKAGE", text), "a placeholder was left"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("My-mixer", "'My-mixer' is no name for a component"),
        ("-x", "No such option"),
        ("a--b", "is no name"),
        ("a-", "is no name"),
        ("../x", "is no name"),
        ("a" * 300, "is no name"),
        ("altx-x", "write 'x'"),
        ("none", "means something else in a recipe"),
        ("true", "means something else in a recipe"),
        ("average", "is taken here by mixer 'average' of altx-toy 1.0"),
        ("toy", "is taken here by plugin altx-toy 1.0"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_made(altx, tmp_path: Path, name: str, reason: str) -> None:
    result = altx("new", "plugin", name)
    assert result.exit_code == 2 and reason in result.stderr, result.output
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(altx, tmp_path: Path) -> None:
    (tmp_path / "altx-mine").mkdir()
    result = altx("new", "plugin", "mine")
    assert result.exit_code == 2 and "altx-mine exists already" in result.stderr
    assert not list((tmp_path / "altx-mine").iterdir())
    assert "there is no directory nowhere" in altx("new", "plugin", "mine", "--dir", "nowhere").stderr


def test_the_kind_is_the_names_last_word_unless_it_is_given(altx, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, kind, options in (
        ("my-memory", "memory", []), ("leaky", "mixer", []), ("build-context", "router", ["--kind", "router"]),
    ):  # fmt: skip
        made = json.loads(altx("new", "plugin", name, *options, "--dir", "there", "--json").stdout)
        assert (made["kind"], Path(made["path"])) == (kind, Path("there") / f"altx-{name}")
        for file in made["files"]:
            if file.endswith(".py"):
                compile((tmp_path / made["path"] / file).read_text(), file, "exec")
    text = (tmp_path / "there/altx-build-context/src/altx_build_context/router.py").read_text()
    assert "class BuildContextRouter(Router)" in text
