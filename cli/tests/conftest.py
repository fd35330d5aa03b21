"""Packages that are installed for one test, and a way to run the command line in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from altx import registry
from altx_cli import external
from altx_cli.main import app

TOY = Path(__file__).with_name("cli_toy.py")


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a package for this test: its metadata, and a module of the given source."""
    site = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, group: str, entry: str, module: str, source: str | Path, version: str = "1.0") -> None:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        if isinstance(source, Path):
            shutil.copy(source, site / f"{module}.py")
        else:
            (site / f"{module}.py").write_text(source)
        forget()

    forget()
    yield install
    forget()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(site)):
            del sys.modules[name]


def forget() -> None:
    """Look for packages anew."""
    registry.default.cache_clear()
    external.offers.cache_clear()


@pytest.fixture
def altx(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run `altx ARGS` in an empty directory, with the toy plugin and no other."""
    install("altx-toy", "altx.plugins", "toy = cli_toy", "cli_toy", TOY)
    monkeypatch.setenv("ALTX_PLUGINS", "toy")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args], prog_name="altx")
