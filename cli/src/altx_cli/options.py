"""What the commands read: options that several of them have, and values that need parsing."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from altx.registry import Registry

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Kind = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        autocompletion=lambda incomplete: complete_kind(incomplete),
        help="Only of this kind: mixer, feed-forward, memory, router, or one that a plugin adds.",
    ),
]
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
    from altx import plain
    from altx.errors import ConfigError

    settings: dict[str, Any] = {}
    for pair in pairs or ():
        path, equals, text = pair.partition("=")
        if not equals or not path.strip():
            raise typer.BadParameter(f"--set {pair!r} is not PATH=VALUE, such as mamba.state_size=8")
        try:
            settings[path.strip()] = plain.parse(text, f"--set {pair!r}")
        except ConfigError as error:
            raise typer.BadParameter(error.what) from None
    return settings


def complete(kind: str) -> Any:
    """Completion of a component's name, or of the last name in a pattern of them, from metadata and without torch.

    Args:
        kind: the components' kind; "" for those of all kinds.
    """

    def names(incomplete: str) -> list[tuple[str, str]]:
        start = max(incomplete.rfind(","), incomplete.rfind("*")) + 1
        with _quiet():
            known = registry().components(kind or None)
            twice = Counter(c.name for c in known if c.spec.kind == kind)
            found = {c.qualified if twice[c.name] > 1 else c.name: c.spec.summary for c in known}
            return [(incomplete[:start] + n, what) for n, what in found.items() if n.startswith(incomplete[start:])]
        return []

    return names


def complete_kind(incomplete: str) -> list[str]:
    """Completion of a kind of component, those of other packages included."""
    with _quiet():
        plugins = registry()
        plugins.load_all()
        return [name for name in plugins.kinds if name.startswith(incomplete)]
    return []


def complete_attach(incomplete: str) -> list[str]:
    """Completion of a way to attach a memory."""
    from altx.spec import ATTACH_MODES

    return [mode for mode in ATTACH_MODES if mode.startswith(incomplete)]


def complete_missing(incomplete: str) -> list[str]:
    """Completion of a plugin that is not installed."""
    from altx_cli.external import packages
    from altx_cli.index import INDEX

    found = [
        name for package, offers in INDEX.items() if package not in packages() for name in (package, *offers.split())
    ]
    return [name for name in found if name.startswith(incomplete)]


def complete_package(incomplete: str) -> list[str]:
    """Completion of a package that is installed and brings a plugin."""
    from altx_cli.external import packages

    short = incomplete if incomplete.startswith("altx") else f"altx-{incomplete}"
    return [name.removeprefix("" if short == incomplete else "altx-") for name in packages() if name.startswith(short)]


def registry() -> Registry:
    """The installed plugins."""
    from altx.registry import default

    return default()


@contextmanager
def _quiet() -> Iterator[None]:
    """Whatever is wrong with the plugins or printed by them, a shell that completes a word shall not see it."""
    with suppress(Exception), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
