"""`altx show`: everything about one component."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altx_cli.options import Json, Kind, complete
from altx_cli.output import emit, table

if TYPE_CHECKING:
    from altx.config import Config
    from altx.registry import Component


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete(""), help="A component's name.")],
    kind: Kind = None,
    as_json: Json = False,
) -> None:
    """Show what a component is, its settings, and what it can do."""
    from altx import registry

    report = describe(registry.default().find(name, kind))
    if as_json:
        emit(report)
    else:
        print("\n".join(_text(report)))


def describe(component: Component) -> dict[str, Any]:
    """A component as plain data.

    Raises:
        BrokenPlugin: if its config cannot be imported.
    """
    from altx.registry import KINDS
    from altx.resolve import config_type
    from altx.spec import ComponentSpec, MemorySpec

    spec = component.spec
    config = config_type(component) if spec.config else None
    capabilities, problem = _capabilities(component, config) if spec.capabilities else (None, "")
    report: dict[str, Any] = {
        "name": spec.name,
        "qualified": component.qualified,
        "kind": spec.kind,
        "summary": spec.summary,
        "description": spec.description,
        "plugin": component.plugin.distribution,
        "version": component.plugin.version,
        "licence": spec.licence,
        "paper": spec.paper,
        "install": spec.install or f"pip install {component.plugin.distribution}",
        "settings": _settings(config) if config else None,
        "capabilities": capabilities,
        "capabilities_problem": problem,
    }
    if isinstance(spec, MemorySpec):
        report |= {"attach": list(spec.attach), "default_attach": spec.default_attach, "attach_note": spec.attach_note}
    elif spec.kind not in {kind.name for kind in KINDS}:
        common = {field.name for field in fields(ComponentSpec)}
        report["record"] = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in common}
    return report


def _settings(config: type[Config]) -> list[dict[str, Any]]:
    schema = config.model_json_schema()
    required = schema.get("required", [])
    return [
        _setting(name, field, schema) | {"required": name in required}
        for name, field in schema.get("properties", {}).items()
    ]


def _capabilities(component: Component, config: Any) -> tuple[dict[str, Any] | None, str]:
    """Capabilities with the default config, or why there are none."""
    from altx import part
    from altx.errors import AltxError

    try:
        with component.guard(f"{component}: its default settings are refused"):
            defaults = config()
        capabilities = part.capabilities(component, defaults)
    except AltxError as error:
        return None, error.what
    return {field.name: getattr(capabilities, field.name) for field in fields(capabilities)}, ""


def _setting(name: str, field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "type": _type(field, schema),
        "default": field.get("default"),
        "description": field.get("description", ""),
    }


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON schema's type and bounds in a few words: `int > 0 or none`."""
    if "$ref" in field:
        return _type(schema["$defs"][field["$ref"].rpartition("/")[2]], schema)
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_type(option, schema) for option in options)
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    plain = {
        "integer": "int",
        "number": "float",
        "boolean": "bool",
        "string": "text",
        "object": "mapping",
        "null": "none",
    }
    name = plain.get(field.get("type", ""), "any")
    if field.get("type") == "array":
        name = f"list of {_type(field.get('items', {}), schema)}"
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return " ".join([name, *bounds])


def _text(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['name']}  {report['kind']} of {report['plugin']} {report['version']}", report["summary"]]
    if report["description"]:
        lines += ["", *report["description"].strip().splitlines()]
    facts = [[key, report[key]] for key in ("paper", "licence", "install") if report[key]]
    lines += ["", *table(facts)]
    if "attach" in report:
        modes = [f"{m} (default)" if m == report["default_attach"] else m for m in report["attach"]]
        lines += ["", f"attaches as {', '.join(modes)}"]
        lines += [report["attach_note"]] * bool(report["attach_note"])
    if record := report.get("record"):
        lines += ["", *table([[name, _plain(value)] for name, value in record.items()], fold=0)]
    if report["settings"] is None:
        return lines
    lines += ["", f"settings, as {report['name']}.KEY" if report["settings"] else "no settings"]
    rows = [[s["name"], _default(s), s["type"], s["description"]] for s in report["settings"]]
    lines += [f"  {line}" for line in table(rows, ("key", "default", "type", "meaning") if rows else (), fold=2)]
    if report["capabilities"] is None and not report["capabilities_problem"]:
        return lines
    lines += ["", "can do, with the default settings"]
    if report["capabilities"] is None:
        return [*lines, f"  not known: {report['capabilities_problem']}"]
    return lines + [f"  {line}" for line in table(_abilities(report["capabilities"]))]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list, set, frozenset)) else str(value)


def _default(setting: dict[str, Any]) -> str:
    if setting["required"]:
        return "required"
    value = setting["default"]
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _abilities(capabilities: dict[str, Any]) -> list[list[str]]:
    """The capabilities as rows: what it does, what it does not, then the rest by name."""
    flags = {name: value for name, value in capabilities.items() if isinstance(value, bool)}
    rows = [
        ["yes", ", ".join(name for name, value in flags.items() if value) or "-"],
        ["no", ", ".join(name for name, value in flags.items() if not value) or "-"],
    ]
    for name, value in capabilities.items():
        if name in flags or value in (None, 1) or value == frozenset() or value == {}:
            continue
        if isinstance(value, (set, frozenset, tuple, list)):
            value = ", ".join(sorted(map(str, value)))
        elif isinstance(value, dict):
            value = ", ".join(f"{key} (weight {weight:g})" for key, weight in value.items())
        rows.append([name, str(value)])
    return rows
