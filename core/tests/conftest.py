"""Fixtures: a registry that sees only the toy plugin, and a way to install plugins into a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from altx.registry import GROUP, Registry

sys.path.append(str(Path(__file__).parent))

Install = Callable[..., None]


@pytest.fixture
def toy() -> Registry:
    """A registry with the built-ins and `toy_plugin` alone."""
    return Registry(entry_points=[metadata.EntryPoint("toy", "toy_plugin", GROUP)])


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution as pip would, into a folder on the path.

    `install("altx-x", "1.0", {"x": "x_module"}, x_module="source")`.
    """
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(distribution: str, version: str, points: dict[str, str], **modules: str) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)

    yield install
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
