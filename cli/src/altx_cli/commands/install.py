"""`altx install` and `altx uninstall`: plugins by the names of what they offer, with pip of this very Python."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any

import typer

from altx.discovery import canonical
from altx_cli import external
from altx_cli.index import package_of
from altx_cli.options import complete_missing, complete_package
from altx_cli.output import table

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!]*")


def install(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            autocompletion=complete_missing,
            help="A component, a plugin or its package: mamba2, mamba, altx-mamba. NAME==VERSION asks for one version.",
        ),
    ],
    upgrade: Annotated[bool, typer.Option("--upgrade", "-U", help="Install the newest version.")] = False,
) -> None:
    """Install a plugin with pip, and say what it offers.

    The exit status is pip's.
    """
    wanted, equals, version = name.partition("==")
    _check(wanted, NAME)
    if equals:
        _check(version, VERSION)
    before = offered()
    package = canonical(_owner(wanted, before) or package_of(wanted))
    now = external.version(package)
    if now and not upgrade and version in ("", now):
        print(f"{package} {now} is installed already; for a newer one: altx install --upgrade {package}")
        print("\n".join(gained(package, before)))
        return
    _run_pip("install", *["--upgrade"] * upgrade, "--", package + equals + version)
    after = offered()
    print("\n".join(gained(package, after)))
    if _problems(package, after):
        raise typer.Exit(1)


def uninstall(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", autocompletion=complete_package, help="A component, a plugin or its package."),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Uninstall a plugin with pip, and say what goes with it.

    The exit status is pip's.
    """
    from altx.errors import AltxError

    _check(name, NAME)
    before = offered()
    package = canonical(_owner(name, before) or package_of(name))
    if package == "altx":
        raise AltxError(
            f"{name!r} is a part of altx itself, which is not uninstalled from within",
            hint=f"pip does it: {shlex.join(_pip('uninstall', 'altx'))}",
        )
    if not external.version(package):
        names = ", ".join(external.packages()) or "none"
        raise AltxError(f"no plugin {name!r} is installed", hint=f"installed: {names}")
    if not yes and not sys.stdin.isatty():
        raise AltxError("there is nobody to ask", hint="--yes uninstalls without asking")
    print("\n".join(_listed(f"with {package} goes", _offers(package, before))), flush=True)
    _run_pip("uninstall", *["--yes"] * yes, "--", package)


def offered() -> dict[str, Any]:
    """What is installed now, as a new process of this Python sees it: `altx list --json`, and the commands."""
    code = (
        "import json\nfrom altx import registry\nfrom altx_cli import external\n"
        "from altx_cli.commands.list import describe\n"
        "commands = [[name, point.distribution] for name, found in external.offers().items() for point in found]\n"
        "print('\\n' + json.dumps(describe(registry.default(), None) | {'commands': commands}))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        from altx.errors import AltxError

        raise AltxError("the installed plugins cannot be listed, for the reason above", hint="altx doctor says more")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def gained(package: str, listed: dict[str, Any]) -> list[str]:
    """What a package that was installed offers, in words, and what of it cannot be used."""
    rows, problems = _offers(package, listed), _problems(package, listed)
    if not rows and not problems:
        return [f"{package} offers no component and no command: it is no plugin of altx"]
    return _listed(f"{package} offers", rows) + [f"not usable: {reason}" for reason in problems]


def _problems(package: str, listed: dict[str, Any]) -> list[str]:
    return [f"{p['plugin']} {p['version']}: {p['reason']}" for p in listed["problems"] if p["plugin"] == package]


def _offers(package: str, listed: dict[str, Any]) -> list[list[str]]:
    """Kind, name and summary of everything that a package offers."""
    components = [[c["kind"], c["name"], c["summary"]] for c in listed["components"] if c["plugin"] == package]
    return components + [["command", name, f"altx {name}"] for name, owner in listed["commands"] if owner == package]


def _listed(title: str, rows: list[list[str]]) -> list[str]:
    return [title, *(f"  {line}" for line in table(rows, fold=2))] if rows else []


def _owner(name: str, listed: dict[str, Any]) -> str:
    """The installed package that offers a component, or nothing.

    Raises:
        AmbiguousComponent: if several do.
    """
    owners = sorted({c["plugin"] for c in listed["components"] if name in (c["name"], c["qualified"])})
    if len(owners) > 1:
        from altx.errors import AmbiguousComponent

        raise AmbiguousComponent(f"{name!r} is offered by {' and '.join(owners)}", hint="name the package")
    return owners[0] if owners else ""


def _check(text: str, allowed: re.Pattern[str]) -> None:
    """Refuse what is more than a name: pip's options, addresses and paths."""
    if not allowed.fullmatch(text):
        from altx.errors import AltxError

        what = "name" if allowed is NAME else "version"
        raise AltxError(
            f"{text!r} is not the {what} of a package",
            hint="a name, such as mamba or altx-mamba==0.1.0; for files and addresses use pip itself",
        )


def _pip(*arguments: str) -> list[str]:
    # -P: a folder named pip where the user happens to stand is not pip.
    return [sys.executable, "-P", "-m", "pip", *arguments]


def _run_pip(*arguments: str) -> None:
    """Run pip, and end with its exit status if it fails.

    Raises:
        AltxError: if this Python has no pip.
    """
    # By path: setuptools hooks the search by name, and warns of its distutils in it.
    if PathFinder.find_spec("pip") is None:
        from altx.errors import AltxError

        settings = Path(sys.prefix, "pyvenv.cfg")
        made_by_uv = settings.is_file() and re.search(r"^uv\s*=", settings.read_text("utf-8", "replace"), re.MULTILINE)
        uv = ["uv", "pip", arguments[0], "--python", sys.executable, arguments[-1]]
        ensure = [sys.executable, "-m", "ensurepip"]
        raise AltxError(
            f"there is no pip in {sys.prefix}",
            hint=f"run: {shlex.join(uv)}" if made_by_uv else f"get it with: {shlex.join(ensure)}",
        )
    command = _pip(*arguments)
    print(f"running: {shlex.join(command)}", flush=True)
    if status := subprocess.run(command, check=False).returncode:
        raise typer.Exit(status if status > 0 else 128 - status)
