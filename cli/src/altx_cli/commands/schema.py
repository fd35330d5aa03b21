"""`altx schema`: the JSON schema of a model's file, for editors that check and complete YAML."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altx_cli.output import to_json

if TYPE_CHECKING:
    from altx.registry import Component, Registry

KEYS = {"mixer": "mixer", "memory": "memory", "router": "router", "feed_forward": "feed-forward",
        "stack_memory": "memory"}  # fmt: skip
"""Which kind of component a key of the file holds."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to a file instead of stdout.")
    ] = None,
) -> None:
    """Print the JSON schema of a model's file, for editors.

    It knows the settings of every component that is installed, so make it anew when that changes.
    """
    from altx import registry
    from altx.errors import AltxError

    text = to_json(describe(registry.default())) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AltxError(f"{output} cannot be written: {error.strerror}") from None
    print(f"wrote {output}; a model's file that begins with this line is checked while you write it:\n{usage(output)}")


def usage(path: Path | str) -> str:
    """The line by which editors with yaml-language-server find the schema."""
    return f"# yaml-language-server: $schema={path}"


def describe(plugins: Registry) -> dict[str, Any]:
    """The schema of a recipe, short or written out, with the settings of the installed components."""
    from altx.recipe import Recipe

    found = Recipe.model_json_schema()
    definitions = found["$defs"]
    for kind in dict.fromkeys(KEYS.values()):
        options: list[Any] = [_settings(component, definitions) for component in plugins.components(kind)]
        definitions[f"{kind}-settings"] = {"oneOf": options or [False]}
    for part in (found, *(definitions[name] for name in ("Sublayer", "Target"))):
        for key, field in part["properties"].items():
            if key in KEYS:
                _refine(field, KEYS[key], plugins)
    return {
        "$schema": DIALECT,
        "title": "altx model",
        "$comment": usage("PATH-OF-THIS-FILE") + ", as the first line of a model's file",
        **{key: value for key, value in found.items() if key != "title"},
    }


def _refine(field: dict[str, Any], kind: str, plugins: Registry) -> None:
    """Say of a key which components it may name: by a word, a pattern of words, or a mapping with settings."""
    mapping = {"$ref": f"#/$defs/{kind}-settings"}
    names = [name for c in plugins.components(kind) for name in (c.name, c.qualified)] + ["none"] * (kind != "mixer")

    def refine(option: dict[str, Any]) -> dict[str, Any]:
        if option.get("type") == "string":
            # The names complete what is typed; a pattern such as "3*mamba,attention" is a string all the same.
            return {"anyOf": [{"enum": sorted(set(names))}, {"type": "string", "pattern": r"[*,\s]"}]}
        if option.get("type") == "array":
            return {**option, "items": {"anyOf": [refine({"type": "string"}), mapping]}}
        return option

    options = field.pop("anyOf", None) or [{key: field.pop(key) for key in ("$ref", "type") if key in field}]
    single = [{"type": "string"}, mapping]
    expanded = [each for option in options for each in (single if "$ref" in option else [option])]
    if any(option.get("type") == "array" for option in expanded):
        expanded.append(mapping)
    field["anyOf"] = [refine(option) for option in expanded]


def _settings(component: Component, definitions: dict[str, Any]) -> dict[str, Any]:
    """A component written as a mapping: its name and its settings. One whose config is broken may have any."""
    from altx.errors import AltxError
    from altx.resolve import config_type

    prefix = f"{component.spec.kind}.{component.plugin.distribution}.{component.name}."
    names = {"enum": [component.name, component.qualified], "description": component.spec.summary}
    times = {"type": "integer", "minimum": 1, "description": "how often, in a pattern"}
    try:
        own = copy.deepcopy(config_type(component).model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}"))
    except AltxError:
        return {"type": "object", "properties": {"name": names}, "required": ["name"]}
    definitions |= {prefix + name: part for name, part in own.pop("$defs", {}).items()}
    properties = {"name": names, "repeat": times, **own.get("properties", {})}
    return {**own, "properties": properties, "required": ["name", *own.get("required", [])]}
