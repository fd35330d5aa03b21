"""From an input that breaks a law to the smallest that does, in the same way."""

from __future__ import annotations

import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary, extract_tb

from altx.errors import culprit, describe
from altx.testing.case import Case, Failure, Gap
from altx.testing.check import Check
from altx.testing.trial import Trial

DIMS = (2, 4, 8)
"""Widths to try instead of the subject's, the first that suits the component and still breaks the law."""

TRIES, SECONDS = 300, 4.0
"""What a search may take. Only a slow component meets the second."""


@dataclass(frozen=True)
class Breach:
    """How a law was broken.

    Args:
        kind: equal for two inputs that break it in the same way.
        message: in a sentence.
        detail: what was seen with this input, or "".
        gap: the two tensors that should have been equal, if any.
        value, tolerance: what was measured, if anything.
    """

    kind: tuple[str, ...]
    message: str
    detail: str = ""
    gap: Gap | None = None
    value: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Held:
    """A law that held, with what was measured."""

    value: float | None = None
    tolerance: float | None = None


def attempt(check: Check, case: Case, trial: Trial) -> Breach | Held:
    """Try a law with one input."""
    try:
        finding = check.run(case, trial)
    except Failure as error:
        return Breach(("failure", str(error)), str(error), error.detail)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return raised(error)
    if finding is None:
        return Held()
    value, tolerance, message = finding
    # Not `value > tolerance`, which NaN would pass.
    if value <= tolerance:
        return Held(float(value), tolerance)
    gap = value if isinstance(value, Gap) else None
    detail = gap.first(tolerance) if gap is not None else ""
    return Breach(("finding", message), message, detail, gap, float(value), tolerance)


def raised(error: BaseException) -> Breach:
    """An exception, at the line of the component that it comes from."""
    words, cause = describe(error), error
    while cause.__cause__:
        cause = cause.__cause__
    frame = _blamed(cause)
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    lines = [f"{frame.filename}:{frame.lineno}, in {frame.name}", *([f"    {frame.line}"] if frame.line else [])]
    what = f"{culprit(error)} raised {words} ({where})".lstrip()
    return Breach(("raised", type(error).__name__, where), what, "\n".join(lines))


def _blamed(error: BaseException) -> FrameSummary:
    """The innermost frame that is neither altx's nor of an installed package or Python's own, or else the innermost."""
    frames = extract_tb(error.__traceback__)
    others = (str(Path(__file__).parent.parent), sysconfig.get_path("stdlib"), "<")
    theirs = [f for f in frames if not f.filename.startswith(others) and "site-packages" not in f.filename]
    return (theirs or list(frames))[-1]


def smallest(check: Check, case: Case, trial: Trial, breach: Breach) -> tuple[Case, Trial, Breach]:
    """The smallest input found that breaks a law in the same way: greedily, first narrower, then with less in it."""
    deadline, tries = time.perf_counter() + SECONDS, TRIES

    def same(case: Case, candidate: Trial) -> Breach | None:
        nonlocal tries
        tries -= 1
        found = attempt(check, case, candidate)
        return found if isinstance(found, Breach) and found.kind == breach.kind else None

    if case.subject.resized:
        for dim in DIMS:
            try:
                narrow = Case(case.subject.resized(dim))
                found = same(narrow, trial) if narrow.unit == case.unit else None
            except KeyboardInterrupt:
                raise
            except BaseException:  # it cannot be that narrow
                continue
            if found:
                case, breach = narrow, found
                break
    shrinking = True
    while shrinking:
        shrinking = False
        for candidate in trial.smaller(case.unit, check.parts):
            if tries <= 0 or time.perf_counter() > deadline:
                break
            if found := same(case, candidate):
                trial, breach, shrinking = candidate, found, True
                break
    return case, trial, breach
