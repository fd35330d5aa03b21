"""What a check is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from altx.testing.case import Case
from altx.testing.trial import Parts, Trial, plain

Finding = tuple[float, float, str]
"""A measured value, which may be a `Gap`, the tolerance for it, and what to say if it is exceeded."""

EXACT = 1e-10
"""Allowed difference in float64 between two ways of computing the same thing."""

Run = Callable[[Case, Trial], Finding | None]
Code = str | Callable[[Trial, str], str]


@dataclass(frozen=True)
class Check:
    """A law that can be tested.

    Args:
        name: API: waivers and `--only` use it.
        law: the law in a few words.
        needs: names of laws without which this one means nothing.
        applies: why the law does not apply to a case, or None if it does.
        run: tries the law with one input; returns a finding, or None if there is no number; raises Failure.
        trials: the inputs. Smaller ones must mean the same.
        bar: what `|` stands for in the picture of an input.
        parts: whether the law is the same with fewer parts.
        code: Python that shows the failure, given what `altx.testing.example` puts before it; `found` and `wanted`
            are what should be equal. A function makes it from the input and the label of the `Gap`.
        states: expressions of the two states that should be equal, where those differ and not the outputs.
    """

    name: str
    law: str
    needs: tuple[str, ...]
    applies: Callable[[Case], str | None]
    run: Run
    trials: Callable[[Case], list[Trial]] | None
    bar: str
    parts: Parts
    code: Code
    states: tuple[str, str] | None


_registered: dict[str, Check] = {}
REGISTERED: Mapping[str, Check] = MappingProxyType(_registered)
"""Every check by name; nothing but `law` adds one."""


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


def tokens(batch: int, *parts: int) -> Callable[[Case], list[Trial]]:
    """One trial: rows of real tokens, in multiples of the case's unit."""
    return lambda case: [plain(batch, *(n * case.unit for n in parts))]


def law(
    text: str,
    *,
    needs: tuple[str, ...] = (),
    applies: Callable[[Case], str | None] = always,
    trials: Callable[[Case], list[Trial]] | None = None,
    bar: str = "the next call",
    parts: Parts = "keep",
    code: Code = "",
    states: tuple[str, str] | None = None,
) -> Callable[[Run], Run]:
    """Register a check; its name is the function's, with dashes. Without trials, it needs no input."""

    def register(run: Run) -> Run:
        name = run.__name__.replace("_", "-")
        if name in _registered:
            raise ValueError(f"there is a check {name!r} already")
        _registered[name] = Check(name, text, needs, applies, run, trials, bar, parts, code, states)
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
