"""`altx check`: test a component against every law of the contract."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

import typer

from altx_cli.options import Json, Settings, complete, parse_settings
from altx_cli.output import emit, findings


def check(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete(""), help="A component's name.")],
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Its kind, where several have the name.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="CHECK", help="Only this check and those it needs. Repeatable.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Test a component against the laws that it promises to obey.

    Exit status 1 if one of them is broken.
    """
    own = name.rpartition(":")[2] + "."
    config = nested({path.removeprefix(own): value for path, value in parse_settings(settings).items()})

    from altx.errors import AltxError
    from altx.testing import CHECKS, check_component

    if unknown := [wanted for wanted in only or () if wanted not in CHECKS]:
        lines = "\n".join(f"  {known:<22}{law}" for known, law in CHECKS.items())
        raise AltxError(f"there is no check {unknown[0]!r}", hint=f"the checks are\n{lines}")
    results = [asdict(result) for result in check_component(name, kind, config=config, only=tuple(only or ()))]
    totals = Counter(result["status"] for result in results)
    if as_json:
        emit({"component": name, "passed": not totals["failed"], "results": results})
    else:
        print("\n".join(_text(results, totals)))
    if totals["failed"]:
        raise typer.Exit(1)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    config: dict[str, Any] = {}
    for path, value in settings.items():
        *outer, last = path.split(".")
        node = config
        for step in outer:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                raise typer.BadParameter(f"--set {path}: {step!r} has a value already")
        node[last] = value
    return config


def _text(results: list[dict[str, Any]], totals: Counter[str]) -> list[str]:
    lines: list[str] = []
    for subject in dict.fromkeys(result["subject"] for result in results):
        told = findings([result for result in results if result["subject"] == subject])
        lines += [subject, *(f"  {line}".rstrip() for line in told), ""]
    seconds = sum(result["seconds"] for result in results)
    counts = ", ".join(
        f"{totals[status]} {status}" for status in ("passed", "failed", "waived", "skipped") if totals[status]
    )
    return [*lines, f"{counts} in {seconds:.1f} s"]
