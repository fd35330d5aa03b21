"""Laws that hold for one call by itself."""

from __future__ import annotations

import torch

from altx.layer import Layer, descendants
from altx.testing.case import Case, difference, state_difference
from altx.testing.check import EXACT, Failure, Finding, always, law


@law("y has the shape and dtype of x, for every length")
def shapes(case: Case) -> Finding | None:
    for length in (1, 2, 7, 0):
        x = case.inputs(2, length * case.unit)
        out = case.run(x)
        if case.per_token and out.y.shape[:2] != x.shape[:2]:
            raise Failure(f"x is {tuple(x.shape)}, y is {tuple(out.y.shape)}")
        if out.y.dtype != torch.float64:
            raise Failure(f"in float64, y is {out.y.dtype}")
        if not bool(out.y.isfinite().all()):
            raise Failure(f"y is not finite for {length} tokens")
    return None


def _if_deterministic(case: Case) -> str | None:
    return None if case.capabilities.deterministic else "declares that it is not deterministic"


@law("the same call twice gives the same output", needs=("unmutated",), applies=_if_deterministic)
def determinism(case: Case) -> Finding | None:
    x = case.inputs(2, 12 * case.unit)
    return difference(case.run(x).y, case.run(x).y), 0.0, "two equal calls differ"


@law("the global random generator is left alone", needs=("shapes",))
def global_rng(case: Case) -> Finding | None:
    x = case.inputs(2, 5 * case.unit)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        case.run(x)
        if not torch.equal(before, torch.get_rng_state()):
            raise Failure("a call drew from torch's global generator; draw from ctx.generator")
    return None


@law("x and the given state are not written to", needs=("shapes",))
def unmutated(case: Case) -> Finding | None:
    x = case.inputs(2, 6 * case.unit)
    kept = x.clone()
    case.run(x)
    if not torch.equal(x, kept):
        raise Failure("x was written to")
    if case.streams:
        state = case.carried(case.run(x, state=case.state(2)), case.state(2))
        copy = state.clone()
        case.run(x, state=state)
        if state_difference(state, copy) > 0:
            raise Failure("the given state was written to")
    return None


@law("a row's output depends on no other row", needs=("determinism",))
def rows(case: Case) -> Finding | None:
    x = case.inputs(3, 12 * case.unit)
    changed = x.clone()
    changed[1:] = case.other(x)[1:]
    return difference(case.run(changed).y[:1], case.run(x).y[:1]), EXACT, "row 0 changed with rows 1 and 2"


def _if_causal(case: Case) -> str | None:
    if not case.subject.causal:
        return "is checked as an encoder"
    return None if case.per_token else "has one output per row"


@law("no output depends on a later token", needs=("rows",), applies=_if_causal)
def causality(case: Case) -> Finding | None:
    x = case.inputs(2, 12 * case.unit)
    y, worst, where = case.run(x).y, 0.0, 0
    for cut in (1, 6, 11):
        start = cut * case.unit
        changed = x.clone()
        changed[:, start:] = case.other(x)[:, start:]
        found = difference(case.run(changed).y[:, :start], y[:, :start])
        if found > worst:
            worst, where = found, start
    return worst, EXACT, f"outputs before token {where} changed with the tokens from {where} on"


@law("it returns the losses and the exports that it declares", needs=("shapes",))
def declared(case: Case) -> Finding | None:
    out = case.run(case.inputs(2, 6 * case.unit))
    owners = [("", case.layer), *descendants(case.layer)]
    losses = {f"{path}.{name}".lstrip(".") for path, owner in owners for name in owner.capabilities.losses}
    for what, wanted, found in (
        ("losses", losses, set(out.losses)),
        ("exports", set(case.capabilities.provides), set(out.exports)),
    ):
        if isinstance(case.layer, Layer) and wanted != found:
            raise Failure(f"declares the {what} {sorted(wanted) or 'none'} and returns {sorted(found) or 'none'}")
    return None


@law("x leaves its mark: the output is not the same for every input", needs=("shapes",), applies=always)
def sensitivity(case: Case) -> Finding | None:
    x = case.inputs(2, 6 * case.unit + 2 * case.chunk)
    if difference(case.run(case.other(x)).y, case.run(x).y) == 0:
        raise Failure("the output does not depend on the input")
    return None
