"""Whether the checks are those that were installed: what a conformance test relies on and nobody may change."""

from __future__ import annotations

import sys
from types import CodeType, FunctionType
from typing import Any

from altx.testing.check import REGISTERED, Check

_held: dict[tuple[str, str], Any] = {}
_bodies: dict[tuple[str, str], CodeType] = {}
_checks: dict[str, Check] = {}


def _names() -> dict[tuple[str, str], Any]:
    """What the modules of the kit hold, by module and name."""
    prefix = __name__.rpartition(".")[0] + "."
    return {
        (name, key): value
        for name, module in sorted(sys.modules.items())
        if name.startswith(prefix) and name != __name__
        for key, value in vars(module).items()
        if not key.startswith("__")
    }


def remember() -> None:
    """Take what is there now for what was installed; the kit does when it is imported."""
    _held.update(_names())
    _bodies.update({place: value.__code__ for place, value in _held.items() if isinstance(value, FunctionType)})
    _checks.update(REGISTERED)


def changes() -> list[str]:
    """What is not as it was installed, in words; empty if all is.

    A shortcut shows here, such as `monkeypatch.setattr("altx.testing.batching.EXACT", 1.0)`. Against somebody who
    means to deceive there is no guard in Python.
    """
    now = _names()
    found = [".".join(place) for place, value in _held.items() if now.get(place) is not value]
    found += [".".join(place) for place, body in _bodies.items() if _held[place].__code__ is not body]
    found += ["altx.testing.check.REGISTERED"] if dict(REGISTERED) != _checks else []
    return [f"{what} is not what was installed" for what in dict.fromkeys(found)]
