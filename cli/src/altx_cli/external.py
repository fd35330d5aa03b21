"""Commands that other packages add: entry-point group `altx.commands`, each value a typer-annotated function.

The entry point's module must be light, because `altx --help` imports it to show its help line. A command
that cannot be used stays in the list with the reason and breaks nothing else.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from altx.discovery import Plugin

GROUP = "altx.commands"


@functools.cache
def offers() -> dict[str, list[Plugin]]:
    """Entry points by the name of the command that they offer."""
    from altx.discovery import installed

    found: dict[str, list[Plugin]] = {}
    for point in sorted(installed(GROUP), key=lambda point: (point.name, point.distribution)):
        found.setdefault(point.name, []).append(point)
    return found


def packages() -> dict[str, str]:
    """Versions of the packages that bring plugins or commands, by their metadata alone."""
    from altx.discovery import installed

    points = [*installed(), *(point for points in offers().values() for point in points)]
    return dict(sorted((point.distribution, point.version) for point in points))


def version(package: str) -> str:
    """The version of a package that brings plugins or commands, or nothing if it is not installed."""
    from altx import __version__

    return __version__ if package == "altx" else packages().get(package, "")


def load(name: str, points: list[Plugin]) -> Any:
    """The command that packages offer under a name.

    Raises:
        BrokenPlugin: naming the packages, if there are several, if one takes a name of altx's own, or if
            it cannot be imported.
    """
    from altx_cli.main import COMMANDS, make

    packages = " or ".join(point.distribution for point in points)
    if name in COMMANDS:
        reason, remedy = "has the name of one of altx's own", f"it is ignored; pip uninstall {packages}"
    elif len(points) > 1:
        reason, remedy = "is offered twice", f"keep one: pip uninstall {packages}"
    else:
        reason, remedy = "cannot be loaded: ", f"reinstall it: pip install --force-reinstall {packages}"
        module, _, attributes = points[0].module.partition(":")
        try:
            if not points[0].errors:
                found: Any = functools.reduce(
                    getattr, filter(None, attributes.split(".")), importlib.import_module(module)
                )
                return make(name, found)
            reason += points[0].errors[0]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            from altx.errors import describe

            reason += describe(error)

    from altx.errors import BrokenPlugin

    owners = " and ".join(map(str, points))
    raise BrokenPlugin(f"the command {name!r} of {owners} {reason}", hint=remedy)


def problem(name: str, points: list[Plugin]) -> str:
    """Why a command cannot be used, or nothing."""
    from altx.errors import AltxError

    try:
        load(name, points)
    except AltxError as error:
        return f"{error.what}; {error.hint}"
    return ""


def command(name: str, points: list[Plugin]) -> Any:
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
