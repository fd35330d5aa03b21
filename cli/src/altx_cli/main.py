"""The `altx` command. The code of a subcommand is imported when it is needed, and torch only by those that compute."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from altx_cli.output import reporting, writing

COMMANDS = {
    "compose": "altx_cli.commands.compose:compose",
    "generate": "altx_cli.commands.generate:generate",
    "list": "altx_cli.commands.list:list_components",
    "show": "altx_cli.commands.show:show",
    "check": "altx_cli.commands.check:check",
    "guide": "altx_cli.commands.guide:guide",
    "kernels": "altx_cli.commands.kernels:kernels",
    "doctor": "altx_cli.commands.doctor:doctor",
    "schema": "altx_cli.commands.schema:schema",
    "new": "altx_cli.commands.new:new",
    "install": "altx_cli.commands.install:install",
    "uninstall": "altx_cli.commands.install:uninstall",
}
"""altx's own commands, in the order of `altx --help`. Other packages add theirs; see `altx_cli.external`."""

STATUSES = """\b
Exit status:
  0    done
  1    a proof or a check failed, or what was just installed cannot be used
  2    something to put right in the input, a plugin or this machine: the message
       says what and how, without a traceback
  3    a fault of altx or of a package that extends it, with its traceback
  130  interrupted by Ctrl-C
  141  nobody reads the output any more
"""
FAULT = 3


class Command(TyperCommand):
    """A command whose errors are reported as JSON where it was asked for JSON."""

    def invoke(self, ctx: Any) -> Any:
        as_json = any("--json" in param.opts and ctx.params.get(param.name) for param in self.params)
        with reporting(as_json):
            return super().invoke(ctx)


class Commands(TyperGroup):
    """Commands that are imported when they are needed, altx's own and those of other packages."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with writing():
            return super().make_context(*args, **kwargs)

    def list_commands(self, ctx: Any) -> list[str]:
        from altx_cli import external

        return [*COMMANDS, *(name for name in external.offers() if name not in COMMANDS)]

    def get_command(self, ctx: Any, name: str) -> Any:
        if name in COMMANDS:
            module, _, attribute = COMMANDS[name].partition(":")
            return make(name, getattr(importlib.import_module(module), attribute))
        from altx_cli import external

        if offers := external.offers().get(name):
            return external.command(name, offers)
        if close := difflib.get_close_matches(name, self.list_commands(ctx), n=1):
            ctx.fail(f"No such command {name!r}. Did you mean {close[0]!r}?")
        return None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        super().format_commands(ctx, formatter)
        from altx_cli import external

        for name in COMMANDS.keys() & external.offers().keys():
            formatter.write_paragraph()
            formatter.write_text(external.problem(name, external.offers()[name]))

    def invoke(self, ctx: Any) -> Any:
        with reporting():
            return super().invoke(ctx)


def make(name: str, function: Callable[..., Any] | typer.Typer, **options: Any) -> Any:
    """The command that runs a typer-annotated function, or a group of commands."""
    if isinstance(function, typer.Typer):
        group = typer.main.get_command(function)
        group.name = name
        return group
    single = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    single.command(name, cls=Command, **options)(function)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, epilog=STATUSES
)


def _version(wanted: bool) -> None:
    if wanted:
        from altx import __version__
        from altx_cli import external

        packages = {"altx": __version__} | external.packages()
        print("\n".join(f"{name} {version}" for name, version in packages.items()))
        raise typer.Exit


@app.callback()
def altx(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the versions of altx and its plugins."),
    ] = False,
) -> None:
    """Assemble hybrid sequence models from plugins, prove laws about them, and say what they cost."""


def main() -> None:
    """Run the command line."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other soon sleep: where other programs want the cores too, threads that spin as
        # long as OpenMP lets them by default made a training step 35 times slower.
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    for stream in (sys.stdout, sys.stderr):
        # A name or a byte that the terminal cannot show is no reason to stop.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="altx")
    except Exception:
        traceback.print_exc()
        print("this is a fault of altx or of a plugin; `altx doctor` prints what a report needs", file=sys.stderr)
        sys.exit(FAULT)
