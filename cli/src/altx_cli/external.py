"""Commands that other packages add: entry-point group `altx.commands`, each value a typer-annotated function.

The entry point's module must be light, because `altx --help` imports it to show its help line. A command
that cannot be used stays in the list with the reason and breaks nothing else.
"""

from __future__ import annotations

import functools
import re
from importlib import metadata
from typing import Any

GROUP = "altx.commands"


@functools.cache
def offers() -> dict[str, list[metadata.EntryPoint]]:
    """Entry points by the name of the command that they offer."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, owner(point))):
        found.setdefault(point.name, []).append(point)
    return found


def packages() -> dict[str, str]:
    """Versions of the packages that bring plugins or commands, by their metadata alone."""
    from altx.registry import GROUP as PLUGINS

    points = [point for group in (PLUGINS, GROUP) for point in metadata.entry_points(group=group)]
    return dict(sorted((normal(point.dist.name), point.dist.version) for point in points if point.dist))


def installed(package: str) -> str:
    """The version of a package that brings plugins or commands, or nothing if it is not installed."""
    from altx import __version__

    return __version__ if package == "altx" else packages().get(package, "")


def normal(package: str) -> str:
    """A package's name as altx lists it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def owner(point: metadata.EntryPoint) -> str:
    """Name and version of the package that an entry point came with."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def load(name: str, points: list[metadata.EntryPoint]) -> Any:
    """The command that packages offer under a name.

    Raises:
        BrokenPlugin: naming the packages, if there are several, if one takes a name of altx's own, or if
            it cannot be imported.
    """
    from altx_cli.main import COMMANDS, make

    if name not in COMMANDS and len(points) == 1:
        try:
            return make(name, points[0].load())
        except (Exception, SystemExit) as error:
            from altx.registry import describe

            reason = f"cannot be loaded: {describe(error)}"
            remedy = f"reinstall it: pip install --force-reinstall {_packages(points)}"
    elif name in COMMANDS:
        reason, remedy = "has the name of one of altx's own", f"it is ignored; pip uninstall {_packages(points)}"
    else:
        reason, remedy = "is offered twice", f"keep one: pip uninstall {_packages(points)}"

    from altx.errors import BrokenPlugin

    owners = " and ".join(map(owner, points))
    raise BrokenPlugin(f"the command {name!r} of {owners} {reason}", hint=remedy)


def problem(name: str, points: list[metadata.EntryPoint]) -> str:
    """Why a command cannot be used, or nothing."""
    from altx.errors import AltxError

    try:
        load(name, points)
    except AltxError as error:
        return f"{error.what}; {error.hint}"
    return ""


def command(name: str, points: list[metadata.EntryPoint]) -> Any:
    """The command, or one that stands in for it and says why it cannot be used."""
    from altx_cli.main import make

    try:
        return load(name, points)
    except Exception as error:
        broken = error

    def refuse() -> None:
        raise broken

    first_line = str(broken).splitlines()[0].removeprefix(f"the command {name!r} ")
    return make(
        name,
        refuse,
        short_help=f"(unavailable: {first_line})",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
    )


def _packages(points: list[metadata.EntryPoint]) -> str:
    return " or ".join(point.dist.name if point.dist else point.value for point in points)
