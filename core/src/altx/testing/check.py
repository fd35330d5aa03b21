"""What a check is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from altx.testing.case import Case

Finding = tuple[float, float, str]
"""A measured value, the tolerance for it, and what to say if it is exceeded."""

EXACT = 1e-10
"""Allowed difference in float64 between two ways of computing the same thing."""


class Failure(AssertionError):
    """A law is broken in a way that no number describes."""


@dataclass(frozen=True)
class Check:
    """A law that can be tested.

    Args:
        name: API: waivers and `--only` use it.
        law: the law in a few words.
        needs: names of laws without which this one means nothing.
        applies: why the law does not apply to a case, or None if it does.
        run: returns a finding, or None if there is no number; raises Failure.
    """

    name: str
    law: str
    needs: tuple[str, ...]
    applies: Callable[[Case], str | None]
    run: Callable[[Case], Finding | None]


REGISTERED: dict[str, Check] = {}


def always(case: Case) -> str | None:
    return None


def if_streaming(case: Case) -> str | None:
    if not case.per_token:
        return "has one output per row"
    if not case.streams:
        return "does not stream" if case.subject.causal else "is checked as an encoder"
    return None


def if_masked(case: Case) -> str | None:
    return None if case.capabilities.masked else "declares that it takes no mask"


def law(
    text: str, *, needs: tuple[str, ...] = (), applies: Callable[[Case], str | None] = always
) -> Callable[[Callable[[Case], Finding | None]], Callable[[Case], Finding | None]]:
    """Register a check; its name is the function's, with dashes."""

    def register(run: Callable[[Case], Finding | None]) -> Callable[[Case], Finding | None]:
        name = run.__name__.replace("_", "-")
        if name in REGISTERED:
            raise ValueError(f"there is a check {name!r} already")
        REGISTERED[name] = Check(name, text, needs, applies, run)
        return run

    return register


def ordered() -> list[Check]:
    """All checks, each after those that it builds on."""
    done: dict[str, Check] = {}

    def visit(check: Check) -> None:
        for name in check.needs:
            if name not in done:
                visit(REGISTERED[name])
        done.setdefault(check.name, check)

    for check in REGISTERED.values():
        visit(check)
    return list(done.values())
