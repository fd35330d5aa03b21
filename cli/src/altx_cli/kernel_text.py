"""What `altx kernels` prints for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from math import inf
from typing import TYPE_CHECKING, Any

from altx_cli.output import paint, plural, table

if TYPE_CHECKING:
    from altx_kernels.bench import Timing
    from altx_kernels.verify import Failure, Finding

SHOWN = 5
"""Failures told of one backend in one dtype; --json has all of them."""


def listing(report: dict[str, Any]) -> list[str]:
    """The ops, their backends, and the choices."""
    lines: list[str] = [f"pinned by ALTX_KERNEL={report['pin']}", ""] * bool(report["pin"])
    for op in report["ops"]:
        package = " ".join(filter(None, (op["package"], op["version"])))
        lines += [f"{op['op']}  ({package})" + (f"  {op['summary']}" if op["summary"] else "")]
        rows = [[b["backend"], b["absent"] or paint("available", "green")] for b in op["backends"]]
        lines += [f"  {line}" for line in table(rows)]
        absent = {b["backend"] for b in op["backends"] if b["absent"]}
        lines += [f"  chosen on {line}" for line in _choices(op["choices"], absent)] + [""]
    if not report["ops"]:
        lines += ["no installed package brings an op", ""]
    return [*lines, *problems(report["problems"]), "next: altx kernels verify, altx kernels bench"]


def _choices(choices: list[dict[str, Any]], absent: Collection[str]) -> list[str]:
    """`cpu: native`, or with what differs in training; why those that are here cannot run is said too."""
    lines = []
    for device in dict.fromkeys(choice["device"] for choice in choices):
        inference, training = (choice for choice in choices if choice["device"] == device)
        text = _chosen(inference)
        if _chosen(training) != text:
            text = f"{text} for inference, {_chosen(training)} for training"
        reasons = {**inference["refused"], **training["refused"]}
        notes = [f" ({name}: {reason})" for name, reason in reasons.items() if name not in absent]
        lines.append(f"{device}: {text}{''.join(notes)}")
    return lines


def _chosen(choice: dict[str, Any]) -> str:
    return (choice["backend"] or f"none: {choice['problem']}") + " (pinned)" * bool(choice["pin"])


def findings(results: list[Finding]) -> list[str]:
    """Lines about one op: a row for each backend, device and dtype, and what went wrong there."""
    rows: list[list[str]] = []
    details: list[list[str]] = []
    absent: list[list[str]] = []
    told: set[tuple[str, str]] = set()
    for finding in results:
        reason = f"skipped: {'; '.join(finding.skipped)}"
        where = [finding.backend, finding.device, finding.dtype]
        if not finding.device:
            absent.append([finding.backend, reason] if finding.backend else [reason])
        elif finding.status != "skipped":
            verdict = paint("FAILED", "red") if finding.failures else paint("ok", "green")
            partly = f", {plural(sum(finding.skipped.values()), 'call')} skipped" * bool(finding.skipped)
            rows.append([*where, plural(finding.calls, "call"), _error(finding), verdict + partly])
            # Reasons are told once, not in every dtype.
            new = [f"skipped: {text}" for text in finding.skipped if (finding.backend, text) not in told]
            told |= {(finding.backend, text) for text in finding.skipped}
            details.append(_failures(finding.failures) + new)
        elif rows and rows[-1][:2] == where[:2] and rows[-1][-1] == reason:
            rows[-1][2] += f", {finding.dtype}"
        else:
            rows.append([*where, "", "", reason])
            details.append([])
    lines = []
    for line, detail in zip(table(rows, right=(3, 4)), details, strict=True):
        lines += [line, *(f"    {text}" for text in detail)]
    return lines + table(absent)


def _error(finding: Finding) -> str:
    return f"{finding.error:.1e} {'<=' if finding.error <= finding.tolerance else '>'} {finding.tolerance:.0e}"


def _failures(failures: list[Failure]) -> list[str]:
    """The worst first; what fails alike in several layouts is one line."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for failure in sorted(failures, key=lambda failure: failure.error if failure.error > 0 else inf, reverse=True):
        alike.setdefault((failure.example, failure.what, failure.message), []).append(failure.layout)
    lines = [
        f"{example}: {what}: {message}" + f" ({', '.join(layouts)})" * any(layouts)
        for (example, what, message), layouts in alike.items()
    ]
    return lines[:SHOWN] + [f"and {len(lines) - SHOWN:,} more; --json has all"] * (len(lines) > SHOWN)


def verdict(found: list[Finding], totals: Counter[str]) -> str:
    """The sum of what was verified."""
    calls, seconds = sum(finding.calls for finding in found), sum(finding.seconds for finding in found)
    if not totals["passed"] and not totals["failed"]:
        return "nothing was verified: altx kernels list says what is available here"
    counts = ", ".join(f"{totals[status]} {status}" for status in ("passed", "failed", "skipped") if totals[status])
    return f"{counts}: {plural(calls, 'call')} in {seconds:.1f} s"


def problems(found: list[dict[str, str]]) -> list[str]:
    """What could not be imported."""
    lines = [f"  {problem['from']}: {problem['reason']}" for problem in found]
    return ["could not be imported, so that its ops are missing", *lines, ""] if lines else []


def case(timings: list[Timing]) -> list[str]:
    """A table of one workload: a row for each mode and backend, the floors, and what was not timed."""
    first = timings[0]
    rows = [
        [t.backend, t.mode, time_text(t.median), _spread(t), _ratio(t.to_floor), _ratio(t.to_fastest), t.note]
        for t in timings
        if t.median is not None
    ]
    rows += [
        ["floor", t.mode, time_text(t.floor), "", "", "", f"by {t.bound}"]
        for t in {t.mode: t for t in timings}.values()
    ]
    lines = table(rows, ("", "", "median", "quartiles", "x floor", "x fastest", ""), right=(2, 4, 5))
    missing: dict[tuple[str, str], list[str]] = {}
    for t in timings:
        if t.median is None:
            missing.setdefault((t.backend, t.note), []).append(t.mode)
    lines += [
        f"{backend}" + (f", {modes[0]}" if len(modes) == 1 and len({t.mode for t in timings}) > 1 else "") + f": {note}"
        for (backend, note), modes in missing.items()
    ]
    title = f"{first.op}  {first.workload}  {first.dtype} on {first.device}"
    return [title, *(f"  {line}" for line in lines)]


def legend(found: list[Timing], machine: dict[str, Any]) -> list[str]:
    """What the timings were taken on, and what the floor is."""
    if not found:
        return ["nothing was timed: none of these ops has a workload for this machine"]
    cut = any(t.note.startswith(("cut off", "not run")) for t in found)
    return [
        f"torch {machine['torch']}, {plural(machine['threads'], 'thread')}"
        + (f", {machine['gpu']}" if machine["gpu"] else ""),
        "floor: the bytes at the speed of a copy, or the operations at that of a matrix product, measured in this run",
        *["not all had the time they need: raise --seconds, or name fewer ops"] * cut,
    ]


def time_text(seconds: float | None) -> str:
    """A time in the unit that suits it: 12.3 us."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _spread(timing: Timing) -> str:
    return f"{time_text(timing.low)} .. {time_text(timing.high)}" if timing.rounds > 1 else ""


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
