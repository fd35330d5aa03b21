"""`altx list`: the components that are installed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from altx_cli.options import Json, Kind
from altx_cli.output import emit, table

if TYPE_CHECKING:
    from altx.registry import Registry


def list_components(kind: Kind = None, as_json: Json = False) -> None:
    """List the installed components, and plugins that are unusable."""
    from altx import registry

    plugins = registry.default()
    report = describe(plugins, kind)
    if as_json:
        emit(report)
    else:
        print("\n".join(_text(report, kind)))


def describe(plugins: Registry, kind: str | None) -> dict[str, Any]:
    """The components and the plugins with problems, as plain data."""
    components = plugins.components(kind)
    names = Counter((c.spec.kind, c.name) for c in components)
    return {
        "components": [
            {
                "kind": c.spec.kind,
                "name": c.name,
                "qualified": c.qualified,
                "ambiguous": names[c.spec.kind, c.name] > 1,
                "plugin": c.plugin.distribution,
                "version": c.plugin.version,
                "summary": c.spec.summary,
                "problem": c.missing() or "",
            }
            for c in components
        ],
        "problems": [
            {"plugin": p.distribution, "version": p.version, "status": p.status, "reason": reason}
            for p in plugins.plugins
            for reason in (p.errors or ["not named in ALTX_PLUGINS"] * (p.status == "disabled"))
        ],
    }


def _text(report: dict[str, Any], kind: str | None) -> list[str]:
    components, problems = report["components"], report["problems"]
    ambiguous = sorted({c["name"] for c in components if c["ambiguous"]})
    rows = [
        [
            c["kind"],
            c["qualified"] if c["ambiguous"] else c["name"],
            f"{c['plugin']} {c['version']}",
            f"broken: {c['problem']}" if c["problem"] else c["summary"],
        ]
        for c in components
    ]
    lines = (
        table(rows, ("kind", "name", "plugin", "summary"), fold=0)
        if rows
        else [f"no {kind or 'component'} is installed"]
    )
    for name in ambiguous:
        lines += ["", f"{name!r} alone is ambiguous: write the name with its package, as above"]
    if problems:
        lines += ["", "not usable"]
        rows = [[f"{p['plugin']} {p['version']}", p["status"], p["reason"]] for p in problems]
        lines += [f"  {line}" for line in table(rows, fold=2)]
    return lines
