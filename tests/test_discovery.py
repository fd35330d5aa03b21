"""Plugins as users install them: wheels in an environment of their own, found through real entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOOD = ["altx-attention", "altx-lab", "altx-mamba", "altx-moe", "altx-ntm"]
BAD = ["altx-broken", "altx-clash", "altx-future"]


class Environment:
    """A virtual environment with the wheels of this repository and, linked, what they depend on."""

    def __init__(self, folder: Path, wheels: list[Path]) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "lib" / version / "site-packages"
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if not entry.name.startswith(("altx", "_altx", "__editable__")):
                (site / entry.name).symlink_to(entry)
        command = [sys.executable, "-m", "pip", f"--python={self.bin / 'python'}", "install", "--no-deps", "--no-index"]
        subprocess.run([*command, "--quiet", *map(str, wheels)], check=True)

    def altx(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command, env = [self.bin / "altx", *arguments], {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, cwd=self.bin.parent, env=env)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels by distribution."""
    out = tmp_path_factory.mktemp("wheels")
    sources = {"altx": ROOT} | {n: ROOT / "plugins" / n for n in GOOD} | {n: ROOT / "tests/fixtures" / n for n in BAD}
    found = {}
    for name, source in sources.items():
        target = out / name
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target], cwd=source, check=True
        )
        (found[name],) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def clean(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the good plugins."""
    return Environment(tmp_path_factory.mktemp("clean"), [wheels[name] for name in ["altx", *GOOD]])


@pytest.fixture(scope="module")
def crowded(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment where bad plugins live beside good ones."""
    return Environment(tmp_path_factory.mktemp("crowded"), list(wheels.values()))


def test_a_wheel_is_pure_python_and_complete(wheels: dict[str, Path]) -> None:
    assert all(wheel.name.endswith("-py3-none-any.whl") for wheel in wheels.values())


def test_installed_plugins_are_found(clean: Environment) -> None:
    listed = json.loads(clean.altx("list", "--json").stdout)
    offered = {(c["kind"], c["name"], c["plugin"]) for c in listed["components"]}
    assert {
        ("mixer", "attention", "altx-attention"),
        ("mixer", "mamba", "altx-mamba"),
        ("memory", "ntm", "altx-ntm"),
        ("router", "topk", "altx-moe"),
        ("router", "expert-choice", "altx-moe"),
        ("feed-forward", "swiglu", "altx"),
    } <= offered


def test_a_hybrid_is_composed_and_proved_from_wheels(clean: Environment) -> None:
    done = clean.altx("compose", "--mixer", "mamba", "--memory", "ntm", "--dim", "32", "--json")
    assert done.returncode == 0, done.stderr
    proofs = json.loads(done.stdout)["proofs"]
    assert {p["status"] for p in proofs} == {"passed"}


def test_the_guide_and_the_pytest_plugin_are_in_the_wheel(clean: Environment) -> None:
    assert clean.altx("guide", "padding").stdout.startswith("### padding\n")
    (metadata,) = clean.bin.parent.glob("lib/**/altx-*.dist-info/entry_points.txt")
    assert "[pytest11]\naltx = altx.pytest_plugin" in metadata.read_text()


def test_commands_of_plugins_are_found(clean: Environment) -> None:
    assert "train" in clean.altx("--help").stdout
    assert clean.altx("train", "--help").returncode == 0


def test_bad_plugins_hurt_nobody(crowded: Environment) -> None:
    listed = json.loads(crowded.altx("list", "--json").stdout)
    states = {p["plugin"]: p["status"] for p in listed["problems"]}
    assert states == {"altx-broken": "broken", "altx-future": "incompatible"}
    done = crowded.altx("compose", "--mixer", "attention", "--dim", "32", "--no-prove", "--json")
    assert done.returncode == 0, done.stderr


def test_a_broken_plugin_is_named_with_its_reason(crowded: Environment) -> None:
    text = crowded.altx("list").stdout
    assert "altx-broken" in text and "libfancy.so: cannot open shared object file" in text
    missing = crowded.altx("compose", "--mixer", "fancy")
    assert missing.returncode == 2
    assert "altx-broken 0.7" in missing.stderr and "Traceback" not in missing.stderr


def test_clashing_names_are_an_error_that_lists_the_qualified_ones(crowded: Environment) -> None:
    done = crowded.altx("compose", "--mixer", "mamba")
    assert done.returncode == 2
    assert "'altx-clash:mamba' or 'altx-mamba:mamba'" in done.stderr
    done = crowded.altx("compose", "--mixer", "altx-mamba:mamba", "--dim", "32", "--no-prove", "--json")
    assert done.returncode == 0, done.stderr


def test_a_plugin_from_the_future_says_what_to_upgrade(crowded: Environment) -> None:
    done = crowded.altx("compose", "--mixer", "tomorrow")
    assert done.returncode == 2
    assert "upgrade altx" in done.stderr


def test_a_plugin_is_installed_and_uninstalled_by_the_name_of_what_it_offers(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    own = Environment(tmp_path, [wheels["altx"]])
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels["altx-moe"].parent), "PIP_NO_DEPS": "1"}
    (own.bin.parent / "pip.py").write_text("raise SystemExit('a file of the user was run')")
    done = own.altx("install", "topk", **offline)
    assert done.returncode == 0, done.stderr
    gained = done.stdout.partition("altx-moe offers\n")[2].splitlines()
    assert any(line.split()[:2] == ["router", "topk"] for line in gained)
    failed = own.altx("install", "mamba2", **offline)
    assert failed.returncode == 1 and "No matching distribution found for altx-mamba" in failed.stderr
    gone = own.altx("uninstall", "expert-choice", "--yes")
    assert gone.returncode == 0, gone.stderr
    assert "router" not in own.altx("list").stdout
