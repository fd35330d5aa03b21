"""The house stays in order: what may import what, and what every plugin has."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "core/src/altx"
PLUGINS = sorted(path for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists())
TORCH_FREE = [
    "__init__", "builtin", "capabilities", "config", "discovery", "errors", "feed_forward_config", "hookspecs",
    "joints", "part", "placement", "plain", "recipe", "registry", "resolve", "spec",
]  # fmt: skip


def imports(file: Path) -> set[str]:
    """Modules that a file imports anywhere in it, type checking aside."""
    tree = ast.parse(file.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


def test_core_imports_no_plugin_and_no_kernel() -> None:
    for file in CORE.rglob("*.py"):
        strangers = {name for name in packages(file) if name.startswith("altx_")}
        assert not strangers, f"{file.relative_to(ROOT)} imports {strangers}"


def test_kernels_import_neither_core_nor_plugins() -> None:
    for file in (ROOT / "kernels/src").rglob("*.py"):
        assert not {n for n in packages(file) if n.startswith("altx")} - {"altx_kernels"}, file


def test_the_command_line_imports_no_plugin() -> None:
    for file in (ROOT / "cli/src").rglob("*.py"):
        assert not {n for n in packages(file) if n.startswith("altx_")} - {"altx_cli", "altx_kernels"}, file


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_no_other(plugin: Path) -> None:
    own = plugin.name.replace("-", "_")
    for file in (plugin / "src").rglob("*.py"):
        assert not {n for n in packages(file) if n.startswith("altx_")} - {own, "altx_kernels"}, file


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_lists_and_describes_never_imports_torch(module: str) -> None:
    found = imports(CORE / f"{module}.py")
    assert not any(name.partition(".")[0] in ("torch", "numpy") for name in found)
    heavy = {f"altx.{file.stem}" for file in CORE.glob("*.py") if file.stem not in TORCH_FREE} | {"altx.testing"}
    assert not found & heavy, f"{module} imports {found & heavy}, which import torch"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_is_complete(plugin: Path) -> None:
    project = tomllib.loads((plugin / "pyproject.toml").read_text())["project"]
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == plugin.name
    assert (project["license"], project["requires-python"]) == (root["license"], root["requires-python"])
    assert f"-e plugins/{plugin.name}\n" in (ROOT / "requirements-dev.txt").read_text()
    assert any(re.fullmatch(r"altx>=[\d.]+,<[\d.]+", need) for need in project["dependencies"])
    assert len((plugin / "README.md").read_text().splitlines()) > 10
    points = project["entry-points"]
    if "altx.plugins" in points:
        short = plugin.name.removeprefix("altx-")
        assert points["altx.plugins"] == {short: "altx_" + short.replace("-", "_") + ".plugin"}
        entry = plugin / "src" / plugin.name.replace("-", "_") / "plugin.py"
        if "capabilities=" in entry.read_text():
            assert list((plugin / "tests").glob("*conformance*.py")), "no conformance test"
        own = {entry.parent.name, f"{entry.parent.name}.hookspecs"}  # of a plugin that adds a kind
        light = imports(entry) - own
        assert {name.partition(".")[0] for name in light} <= {"__future__", "altx", "collections", "typing"}
    else:
        assert "altx.commands" in points


def test_no_file_is_too_long_to_hold_one_idea() -> None:
    limits = [("core/src", 400), ("kernels/src", 600), ("cli/src", 400), ("plugins", 400)]
    for folder, limit in limits:
        for file in (ROOT / folder).rglob("*.py"):
            if "kernels" in file.parts or "tests" not in file.parts:
                count = len(file.read_text().splitlines())
                assert count <= (600 if "kernels" in file.parts else limit), f"{file.relative_to(ROOT)}: {count} lines"


def test_tracked_files_name_no_registry_and_no_lock() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = listed.stdout.splitlines()
    assert "uv.lock" not in files
    hosts = re.compile("py" + r"pi\.org|python" + r"hosted|registry\.npm" + "js")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yaml", ".yml", "") and path.is_file():
            assert not hosts.search(path.read_text(errors="ignore")), name
