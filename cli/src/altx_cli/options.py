"""What the commands read: options that several of them have, and values that need parsing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

import typer

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, read as YAML. Repeatable.")
]


def parse_count(text: str) -> int:
    """`130M`, `1.5B`, `250k` or a plain integer as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.strip().replace("_", "").replace(",", "").lower())
    number = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if number < 1:
        raise typer.BadParameter(f"{text!r} is not a number of parameters; write 130M, 1.5B, 250k or 1000000")
    return number


def parse_settings(pairs: Iterable[str] | None) -> dict[str, Any]:
    """`["mamba.state_size=8"]` as `{"mamba.state_size": 8}`."""
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs or ():
        path, equals, text = pair.partition("=")
        if not equals or not path.strip():
            raise typer.BadParameter(f"--set {pair!r} is not PATH=VALUE, such as mamba.state_size=8")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or "it cannot be read"
            raise typer.BadParameter(f"--set {pair!r}: the value is not valid YAML: {reason}") from None
        # YAML 1.1 takes 1e-3 for a word.
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value, re.IGNORECASE):
            value = float(value)
        settings[path.strip()] = value
    return settings


def complete(kind: str) -> Any:
    """Completion of a component's name, or of the last name in a pattern of them."""

    def names(incomplete: str) -> list[str]:
        from altx import registry

        start = max(incomplete.rfind(","), incomplete.rfind("*")) + 1
        known = [component.name for component in registry.default().components(kind or None)]
        return [incomplete[:start] + name for name in known if name.startswith(incomplete[start:])]

    return names
