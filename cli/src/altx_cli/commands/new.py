"""`altx new`: start a plugin from a template that is complete, installs, and passes every check."""

from __future__ import annotations

import shutil
from enum import StrEnum
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from altx_cli.main import Command
from altx_cli.options import Json
from altx_cli.output import emit

TEMPLATE = files("altx_cli") / "templates" / "plugin"
SUFFIX = ".in"


class NewKind(StrEnum):
    """What a plugin can be started with."""

    mixer = "mixer"
    memory = "memory"
    router = "router"


ABOUT = {
    NewKind.mixer: ("h_t = a h_{t-1} + sqrt(1 - a^2) x_t, y_t = W h_t", "altx compose --mixer {}"),
    NewKind.memory: (
        "y_t = W M_{t-1}^T q_t, M_t = a M_{t-1} + k_t v_t^T",
        "altx compose --mixer attention --memory {}",
    ),
    NewKind.router: (
        "the k largest of p = softmax(W x)",
        'altx compose --mixer attention --router {} --ffn "4*swiglu"',
    ),
}
"""What the template computes, and how it is used."""

new = typer.Typer(
    help="Start a plugin.",
    rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True,
)  # fmt: skip


@new.callback()
def group() -> None:
    """Start a plugin."""


@new.command("plugin", cls=Command)
def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The component's name, e.g. my-mixer.")],
    kind: Annotated[
        NewKind | None, typer.Option(help="What it is; the default is the name's last word, or else a mixer.")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where to make the folder altx-NAME; the default is here.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Make altx-NAME, a plugin with one component that passes every check. Nothing is overwritten."""
    from altx.errors import AltxError

    _check_name(name)
    last = name.rpartition("-")[2]
    kind = kind or NewKind.__members__.get(last, NewKind.mixer)
    path = folder / f"altx-{name}"
    if not folder.is_dir():
        raise AltxError(f"there is no directory {folder}", hint="make it, or name another with --dir")
    try:
        path.mkdir()
    except FileExistsError:
        raise AltxError(f"{path} exists already", hint="choose another name, or another place with --dir") from None
    except OSError as error:
        raise AltxError(f"{path} cannot be made: {error.strerror}") from None
    try:
        for part in ("all", kind.value):
            _render(TEMPLATE / part, path, _values(name, kind))
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise AltxError(f"{path} cannot be written: {error.strerror}") from None
    made = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    if as_json:
        emit({"path": str(path), "name": name, "kind": kind.value, "files": made})
        return
    print("\n".join([f"made {path} with the {kind.value} {name!r}", *(f"  {file}" for file in made)]))
    print(f'next: cd {path} && pip install -e ".[test]" && altx check {name} && pytest')


def _check_name(name: str) -> None:
    """Refuse what is no name for a component, or one that something installed has.

    Raises:
        AltxError: with the reason.
    """
    import yaml

    from altx import registry
    from altx.errors import AltxError
    from altx.spec import NAME

    if name.startswith("altx-"):
        raise AltxError(f"{name!r}: altx- is put in front of the name", hint=f"write {name.removeprefix('altx-')!r}")
    if not NAME.fullmatch(name) or name.endswith("-") or "--" in name or len(name) > 60:
        raise AltxError(
            f"{name!r} is no name for a component",
            hint="use small letters, digits and single dashes between them, a letter first, 60 at most: my-mixer",
        )
    if name in ("altx", "none") or yaml.safe_load(name) != name:
        raise AltxError(f"{name!r} means something else in a recipe", hint="choose another name")
    plugins = registry.default()
    taken = [str(component) for component in plugins.components() if component.name == name]
    taken += [f"plugin {p}" for p in plugins.plugins if name == p.name or p.distribution == f"altx-{name}"]
    if taken:
        raise AltxError(
            f"the name {name!r} is taken here by {taken[0]}", hint="choose another, or uninstall that plugin"
        )


def _values(name: str, kind: NewKind) -> dict[str, str]:
    """What stands for the placeholders of the template."""
    from altx import API_VERSION, __version__

    major, minor = (int(number) for number in __version__.split(".")[:2])
    bound = f"{major + 1}" if major else f"0.{minor + 1}"
    formula, usage = ABOUT[kind]
    return {
        "name": name,
        "kind": kind.value,
        "package": "altx_" + name.replace("-", "_"),
        # With its kind, no class has the name of one of altx's: Layer would hide what it is made from.
        "Class": "".join(word.capitalize() for word in [*name.removesuffix(f"-{kind.value}").split("-"), kind.value]),
        "api": str(API_VERSION),
        "range": f">={major}.{minor},<{bound}",
        "formula": formula,
        "usage": usage.format(name),
    }


def _render(template: Traversable, into: Path, values: dict[str, str]) -> None:
    """Write every file of a template, with its placeholders filled in, in its name too."""
    for entry in template.iterdir():
        path = into / entry.name.replace("PACKAGE", values["package"]).removesuffix(SUFFIX)
        if entry.is_dir():
            path.mkdir(exist_ok=True)
            _render(entry, path, values)
        else:
            path.write_text(Template(entry.read_text("utf-8")).substitute(values), "utf-8", newline="\n")
