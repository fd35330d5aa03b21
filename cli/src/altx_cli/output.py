"""What the commands print: aligned tables, sizes for people, one JSON object for programs, and errors."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

import typer

DEBUG = "ALTX_DEBUG"
"""Variable that shows where an error came from."""

_json_stream: ContextVar[TextIO | None] = ContextVar("json_stream", default=None)


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Text in a colour, if it goes to a terminal and NO_COLOR is not set."""
    terminal = (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR")
    return typer.style(text, fg=colour) if terminal else text


NARROWEST = 24
"""Characters below which a column is not folded."""


def table(
    rows: Sequence[Sequence[str]], header: Sequence[str] = (), right: Sequence[int] = (), fold: int | None = None
) -> list[str]:
    """Lines of aligned columns.

    Args:
        rows: cells, as many in every row.
        header: names of the columns, printed in capitals.
        right: columns aligned at the right, for numbers.
        fold: if given, the last column's text goes on in lines of its own where a terminal is too narrow, less this
            many characters for a margin. In a pipe a row stays a line.
    """
    lines = [[name.upper() for name in header], *rows] if header else list(rows)
    if not lines:
        return []
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def pad(text: str, column: int) -> str:
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    if fold is not None and sys.stdout.isatty():
        indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
        room = max(shutil.get_terminal_size().columns - fold - indent, NARROWEST)
        lines = [part for line in lines for part in _folded(line, room)]

    return ["  ".join(pad(text, column) for column, text in enumerate(line)).rstrip() for line in lines]


def _folded(line: Sequence[str], room: int) -> Iterator[Sequence[str]]:
    """A row as rows whose last cell has at most `room` characters."""
    *cells, last = line
    first, *more = textwrap.wrap(last, room, break_on_hyphens=False) or [""]
    yield [*cells, first]
    for text in more:
        yield [*("" for _ in cells), text]


def count(n: float) -> str:
    """A number in thousands, millions or billions: 1.3M; "-" if it is not known."""
    if math.isnan(n):
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:.0f}{unit}"
    return f"{n:.3g}"


def size(n: float) -> str:
    """A number of bytes with a binary prefix: 12.5 KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 1 << power:
            return f"{n / (1 << power):.1f}".removesuffix(".0") + f" {unit}"
    return f"{n:.4g} B"


def plural(n: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def findings(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for the results of checks: name, law, measured number, verdict, and why one failed; skipped ones last."""
    told = [result for result in results if result["status"] != "skipped"]
    rows = [[result["check"], result["law"], _measured(result), _verdict(result)] for result in told]
    lines = []
    for result, line in zip(told, table(rows, right=(2,)), strict=True):
        lines.append(line)
        if result["status"] == "failed":
            why = [result["message"], result.get("example", ""), f"altx guide {result['check']}"]
            lines += [f"    {text}".rstrip() for text in "\n".join(filter(None, why)).splitlines()]
    skipped: dict[str, list[str]] = {}
    for result in results:
        if result["status"] == "skipped":
            needs = result["message"].startswith("needs ")
            reason = "as a law that they build on is broken" if needs else result["message"]
            skipped.setdefault(reason, []).append(result["check"])
    for reason, names in skipped.items():
        lines += textwrap.wrap(
            f"skipped, {reason}: {', '.join(names)}", 100, subsequent_indent="    ", break_on_hyphens=False
        )
    return lines


def _measured(result: Mapping[str, Any]) -> str:
    value, tolerance = result["value"], result["tolerance"]
    if value is None or tolerance is None:
        return ""
    return f"{value:.2g} {'<=' if value <= tolerance else '>'} {tolerance:.2g}"


def _verdict(result: Mapping[str, Any]) -> str:
    status = result["status"]
    if status == "passed":
        return paint("ok", "green")
    if status == "failed":
        return paint("FAILED", "red")
    return f"{status}: {result['message']}" if result["message"] else str(status)


def emit(data: dict[str, Any]) -> None:
    """Print the JSON object that `--json` promises."""
    print(to_json(data), file=_json_stream.get() or sys.stdout, flush=True)


def to_json(data: dict[str, Any]) -> str:
    """A JSON object as text."""
    return json.dumps(_finite(data), indent=2)


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: NaN becomes null, infinity its name."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


@contextmanager
def reporting(as_json: bool = False) -> Iterator[None]:
    """Turn errors that a user can mend into a message and exit status 2, and Ctrl-C into status 130.

    Args:
        as_json: describe the error as a JSON object; whatever else is printed meanwhile, by a plugin for
            example, goes to stderr, so that stdout holds one object alone.
    """
    token = _json_stream.set(sys.stdout if as_json else None)
    try:
        with writing(), redirect_stdout(sys.stderr) if as_json else nullcontext():
            try:
                yield
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                raise typer.Exit(130) from None
            except (Exception, SystemExit, GeneratorExit) as raised:
                error = raised if _mendable(raised) else _defect(raised)
                if error is None:
                    raise
                if os.environ.get(DEBUG):
                    traceback.print_exc()
                what, hint = getattr(error, "what", str(error)), getattr(error, "hint", "")
                hint = "\n".join(filter(None, [hint, _installable(what), _origin(raised, what)]))
                if as_json:
                    emit({"error": {"kind": type(error).__name__, "what": what, "hint": hint}})
                else:
                    print(message(what, hint), file=sys.stderr)
                raise typer.Exit(2) from None
    finally:
        _json_stream.reset(token)


@contextmanager
def writing() -> Iterator[None]:
    """End with status 141 and without a word if nobody reads stdout any more, with 2 if the disk is full."""
    try:
        try:
            yield
        finally:
            # It is noticed here rather than when the interpreter shuts down.
            sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            status = 141
        elif error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            status = 2
            print(message(f"the output cannot be written: {error.strerror}"), file=sys.stderr)
        else:
            raise
        # What is still in the buffer would fail again when it is flushed for the last time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(status) from None


def message(what: str, hint: str = "") -> str:
    """An error for people: what is wrong, then what to do about it."""
    first, *more = what.splitlines() or [""]
    lines = [f"{paint('error:', 'red', sys.stderr)} {first}", *(f"       {line}" for line in more)]
    return "\n".join([*lines, *(f"  {line}" for line in hint.splitlines())])


def _installable(what: str) -> str:
    """How to install what nobody offers, if it is known who would."""
    from altx_cli import external, index

    missing = re.search(r"no plugin offers an? [\w-]+ '([a-z0-9-]+)'", what)
    package = index.KNOWN.get(missing[1], "") if missing else ""
    if not missing or not package or external.version(package):
        return ""
    return f"{package} offers it: altx install {missing[1]}"


def _defect(error: BaseException) -> Exception | None:
    """What to tell of an exception in a component's own code, in a forward pass say; None if it is not from there."""
    from altx.errors import BrokenPlugin, culprit, describe, remedy

    if not (who := culprit(error)):
        return None
    hint = remedy(error, "update it, or tell its authors")
    return BrokenPlugin(f"{who} failed: {describe(error)}", hint=f"{hint}; {DEBUG}=1 shows where")


def _origin(error: BaseException, what: str) -> str:
    """In which component's code, of which version, an error was raised; empty if it was in none or its words say so."""
    from altx.errors import culprit

    who = culprit(error)
    return f"(raised in {who})" if who and who not in what else ""


def _mendable(error: BaseException) -> bool:
    from altx.errors import AltxError

    # Kernels know nothing of altx, so their errors are a family of their own.
    kernels = sys.modules.get("altx_kernels")
    return isinstance(error, (AltxError, getattr(kernels, "KernelError", AltxError)))
