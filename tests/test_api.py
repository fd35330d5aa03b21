"""What others rely on changes only on purpose: names, signatures, hooks, options, JSON keys, schemas.

The surface is written out in tests/api.txt, a line per item; docs/stability.md says what may change when. After an
intended change, `python tests/test_api.py` writes the file anew, and its difference is part of the review.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FROZEN = ROOT / "tests/api.txt"
PACKAGES = {"altx": ROOT / "core/src/altx", "altx_kernels": ROOT / "kernels/src/altx_kernels"}
INTERNAL = {
    "altx": {
        "adapters", "attach", "block", "builtin", "discovery", "dispatch", "feed_forward", "feed_forward_config",
        "grouped", "isolation", "joints", "part", "placement", "plain", "recursion", "segment_loop", "segments",
        "testing/",
    },
    "altx_kernels": {
        "bench", "gpu/common", "gpu/compiling", "native/", "causal_conv1d/", "delta_rule/", "gated_rms_norm/",
        "linear_recurrence/",
    },
}  # fmt: skip
"""Modules that are nobody's business but altx's. Of a folder, what its `__init__` exports is public."""
UNREMARKABLE = {"__post_init__", "__repr__", "__str__", "__eq__", "__hash__", "__pydantic_init_subclass__"}
JSON = [
    ["list"],
    ["list", "--kind", "engine"],
    ["show", "mamba"],
    ["show", "ntm"],
    ["check", "attention", "--only", "steps"],
    ["compose", "--mixer", "mamba", "--memory", "ntm", "--dim", "16", "--layers", "1", "-o", "model.yaml"],
    ["kernels", "list"],
    ["kernels", "verify", "causal-conv1d", "--backend", "torch", "--dtype", "float64"],
    ["kernels", "bench", "causal-conv1d", "--backend", "torch", "--seconds", "0"],
    ["doctor"],
]
"""Commands that print JSON; the second fails."""
VARIABLE = re.compile(r"ALTX_(?!FLOAT|DOUBLE|PROBE)[A-Z_]+")
"""Environment variables, and not the macros of the kernels in C."""
DATA = re.compile(r"(\.config|\.environment|\.packages|\.versions|\.plugins|\.refused|\.capabilities)\.(?!\[).*")
"""Keys that are data rather than ours: what a model consists of, say."""


def surface() -> list[str]:
    """Every line of the file."""
    sections = {
        "Python": list(python()),
        "Environment variables": list(environment()),
        "Checks": list(checks()),
        "Commands": list(commands()),
        "Keys of the JSON that commands print": list(json_keys()),
        "Schema of a model": list(schema()),
    }
    lines = []
    for title, items in sections.items():
        lines += ["", f"# {title}", *sorted(set(items))]
    return lines[1:]


def python() -> Iterator[str]:
    """Classes, methods, fields, functions and constants of the public modules."""
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            path = file.relative_to(folder)
            name = ".".join((package, *path.with_suffix("").parts)).removesuffix(".__init__")
            hidden = str(path.with_suffix("")) in INTERNAL[package] or any(p.startswith("_") for p in path.parts[:-1])
            inside = f"{path.parts[0]}/" in INTERNAL[package] and path.name != "__init__.py"
            if not (hidden or inside or (path.stem.startswith("_") and path.stem != "__init__")):
                yield from module(name, file)


def module(name: str, file: Path) -> Iterator[str]:
    """A module's own names; of a package's `__init__`, those in `__all__`."""
    tree = ast.parse(file.read_text())
    exported = next((ast.literal_eval(n.value) for n in tree.body if _assigns(n) == "__all__"), None)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and exported and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) in exported:
                    yield from imported(f"{name}.{alias.asname or alias.name}", node.module, alias.name)
        else:
            yield from definition(name, node, exported)


def imported(name: str, module: str, attribute: str) -> Iterator[str]:
    """A name that a package exports, with what stands behind it where that is not public by itself."""
    package, _, path = module.partition(".")
    yield f"{name} = {module}.{attribute}"
    folder = PACKAGES[package]
    if {path, f"{path.partition('.')[0]}/"} & INTERNAL[package]:
        file = folder / f"{path.replace('.', '/')}.py"
        for node in ast.parse((file if file.exists() else file.with_suffix("") / "__init__.py").read_text()).body:
            yield from definition(module, node, [attribute])


def definition(owner: str, node: ast.stmt, wanted: list[str] | None = None) -> Iterator[str]:
    """The lines for one statement of a module or a class."""

    def public(name: str) -> bool:
        if name.startswith("__"):
            return name.endswith("__") and name not in UNREMARKABLE and name != "__all__"
        return name in wanted if wanted is not None else not name.startswith("_")

    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and public(node.name):
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"{owner}.{node.name}({ast.unparse(node.args)}){returns}{''.join(f'  @{mark}' for mark in marks)}"
    elif isinstance(node, ast.ClassDef) and public(node.name):
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        yield f"{owner}.{node.name}: class({bases}){''.join(f'  @{mark}' for mark in marks)}"
        for child in node.body:
            yield from definition(f"{owner}.{node.name}", child)
    elif isinstance(node, ast.AnnAssign) and public(name := ast.unparse(node.target)):
        yield f"{owner}.{name}: {ast.unparse(node.annotation)}{_value(node.value)}"
    elif (name := _assigns(node)) and public(name):
        yield f"{owner}.{name}{_value(node.value)}"


def _assigns(node: ast.stmt) -> str:
    """The one name that a statement assigns to."""
    plain = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    return node.targets[0].id if plain else ""


def _value(node: ast.expr | None) -> str:
    """A value as it is written, without what only describes it; one that is long is a matter of the code."""
    if isinstance(node, ast.Call):
        node.keywords = [word for word in node.keywords if word.arg != "description"]
    text = f" = {ast.unparse(node)}" if node else ""
    return text if len(text) <= 100 and "re.compile" not in text else " = ..."


def environment() -> Iterator[str]:
    """Variables that altx reads."""
    for file in [*ROOT.glob("*/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and VARIABLE.fullmatch(str(node.value)):
                yield str(node.value)


def checks() -> Iterator[str]:
    """Names of the conformance checks, which waivers and `altx check --only` use."""
    from altx.testing import CHECKS

    yield from CHECKS


def commands() -> Iterator[str]:
    """Every command with its arguments and options, `altx train` included, and how commands end."""
    import typer

    from altx_cli.external import GROUP
    from altx_cli.main import COMMANDS, STATUSES, app

    yield f"entry-point group {GROUP}"
    yield from (f"exit status {status}" for status in re.findall(r"^  (\d+)", STATUSES, re.MULTILINE))

    def walk(command: Any, name: str) -> Iterator[str]:
        yield name
        for param in command.params:
            flags = " ".join([*param.opts, *param.secondary_opts]) if param.opts[0].startswith("-") else param.metavar
            marks = ["required"] * param.required + ["repeatable"] * (param.nargs != 1 or getattr(param, "multiple", 0))
            value = "flag" if getattr(param, "is_flag", False) else f"default {param.default}"
            yield f"{name} {flags}: {', '.join([value, *marks])}"
        for each in command.list_commands(context) if hasattr(command, "list_commands") else ():
            if command is not root or each in {*COMMANDS, "train"}:
                yield from walk(command.get_command(context, each), f"{name} {each}")

    root = typer.main.get_command(app)
    context = root.make_context("altx", [], resilient_parsing=True)
    yield from walk(root, "altx")


absent: set[str] = set()
"""Keys that are null or empty on this machine: of what is beneath them it cannot tell."""


def json_keys() -> Iterator[str]:
    """The keys that `--json` prints, by path."""
    from typer.testing import CliRunner

    from altx import registry
    from altx_cli.main import app

    registry.default.cache_clear()
    runner = CliRunner(env=dict.fromkeys(("ALTX_KERNEL", "ALTX_NATIVE", "ALTX_PLUGINS")))
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for args in JSON:
                done = runner.invoke(app, [*args, "--json"], prog_name="altx")
                assert done.stdout, (args, done.stderr, done.exception)
                command = " ".join(args[: 2 if args[0] == "kernels" else 1])
                data = json.loads(done.stdout)
                absent.update(f"{command} {path}" for path, value in keys(data) if value in (None, [], {}))
                yield from (f"{command} {path}" for path, _ in keys(data))
        finally:
            os.chdir(before)
            registry.default.cache_clear()


def keys(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths to every key in a JSON object, `components[].kind`, and the value there."""
    for key, value in data.items() if isinstance(data, dict) else ():
        inner = f"{path}{key}"
        if DATA.search(f".{inner}"):
            continue
        yield inner, value
        if isinstance(value, list):
            for each in value:
                yield from keys(each, f"{inner}[].")
        else:
            yield from keys(value, f"{inner}.")


def schema() -> Iterator[str]:
    """Keys of a model's file with their types, bounds and defaults."""
    from altx.config import ModelConfig

    root = ModelConfig.model_json_schema()
    for name, part in {"Model": root, **root["$defs"]}.items():
        for key, field in part.get("properties", {}).items():
            need = "required" if key in part.get("required", []) else f"default {json.dumps(field.get('default'))}"
            yield f"{name}.{key}: {_kind(field)}, {need}"


def _kind(field: dict[str, Any]) -> str:
    """A field's type and bounds in one line."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if options := field.get("anyOf") or field.get("oneOf"):
        return " | ".join(map(_kind, options))
    if "const" in field or "enum" in field:
        return " | ".join(map(json.dumps, field.get("enum") or [field["const"]]))
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    words = [f"{sign} {field[key]:g}" for key, sign in bounds.items() if key in field]
    words += [f"{key} {field[key]}" for key in ("minItems", "maxItems") if key in field]
    inner = f" of {_kind(field['items'])}" if "items" in field else ""
    return " ".join([field.get("type", "any") + inner, *words])


def test_the_public_surface_is_what_was_agreed() -> None:
    now = surface()
    beneath = tuple(f"{key}{mark}" for key in absent for mark in (".", "[]."))
    now = [line for line in now if not line.startswith(beneath)]
    frozen = [line for line in FROZEN.read_text().splitlines() if not line.startswith(beneath)]
    if frozen != now:
        changes = [line for line in difflib.unified_diff(frozen, now, "agreed", "now", lineterm="", n=0)]
        raise AssertionError(
            "the public surface has changed:\n" + "\n".join(changes) + "\n"
            "docs/stability.md says what may change when. If it is intended: python tests/test_api.py, "
            "and a line in CHANGELOG.md"
        )


if __name__ == "__main__":
    FROZEN.write_text("\n".join(surface()) + "\n")
    print(f"wrote {FROZEN.relative_to(ROOT)}", file=sys.stderr)
