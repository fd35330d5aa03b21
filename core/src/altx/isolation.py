"""Which plugin a test is about: that of the project it stands in. Imports nothing heavy."""

from __future__ import annotations

import tomllib
from pathlib import Path

from altx.discovery import canonical, installed


def distribution_of(path: Path) -> str | None:
    """The installed distribution whose pyproject.toml is the nearest above a file, if it offers plugins."""
    for folder in path.resolve().parents:
        try:
            name = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]["name"]
        except (OSError, KeyError, ValueError):
            continue
        own = canonical(str(name))
        return own if any(plugin.distribution == own for plugin in installed()) else None
    return None
