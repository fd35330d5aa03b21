"""Laws that hold for one call by itself."""

from __future__ import annotations

import torch

from altx.layer import Layer, descendants
from altx.testing.case import Case, Failure, difference, state_difference
from altx.testing.check import EXACT, Finding, law, tokens
from altx.testing.trial import Trial, plain


def _lengths(case: Case) -> list[Trial]:
    return [plain(2, length * case.unit) for length in (1, 2, 7, 0)]


@law("y has the shape and dtype of x, for every length", trials=_lengths, code="print(layer(x, ctx).y)")
def shapes(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    out = case.run(x)
    if case.per_token and out.y.shape[:2] != x.shape[:2]:
        raise Failure("y has not the batch and the length of x", f"y is {tuple(out.y.shape)}")
    if isinstance(case.layer, Layer) and out.y.shape != x.shape:
        raise Failure("y has not the width of x", f"y is {tuple(out.y.shape)}")
    if out.y.dtype != torch.float64:
        raise Failure(f"of x in float64, y is in {str(out.y.dtype).removeprefix('torch.')}")
    if not bool(out.y.isfinite().all()):
        raise Failure("y is not finite", f"{int((~out.y.isfinite()).sum())} of {out.y.numel()} numbers are not")
    return None


def _if_deterministic(case: Case) -> str | None:
    return None if case.capabilities.deterministic else "declares that it is not deterministic"


@law(
    "the same call twice gives the same output",
    needs=("unmutated",),
    applies=_if_deterministic,
    trials=tokens(2, 12),
    code="""
found = layer(x, ctx).y
wanted = layer(x, ctx).y
""",
)
def determinism(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    return difference(case.run(x).y, case.run(x).y), 0.0, "two equal calls differ"


@law(
    "the global random generator is left alone",
    needs=("shapes",),
    trials=tokens(2, 5),
    code="""
found = torch.get_rng_state()
layer(x, ctx)
wanted = torch.get_rng_state()
""",
)
def global_rng(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        case.run(x)
        if not torch.equal(before, torch.get_rng_state()):
            raise Failure("a call drew from torch's global generator; draw from ctx.generator")
    return None


@law(
    "x and the given state are not written to",
    needs=("shapes",),
    trials=tokens(2, 6),
    code="""
wanted = x.clone()
layer(x, ctx)
found = x
if state := layer.init_state(len(x), dtype=torch.float64):
    state = layer(x, ctx, state).state
    before = state.clone()
    layer(x, ctx, state)
    print(before.flat(), state.flat())
""",
)
def unmutated(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    kept = x.clone()
    case.run(x)
    if difference(x, kept) > 0:
        raise Failure("x was written to", difference(x, kept, "x").first(0.0))
    if case.streams:
        state = case.carried(case.run(x, state=case.state(trial.batch)), case.state(trial.batch))
        copy = state.clone()
        case.run(x, state=state)
        if (gap := state_difference(state, copy)) > 0:
            raise Failure("the given state was written to", gap.first(0.0))
    return None


@law(
    "a row's output depends on no other row",
    needs=("determinism",),
    trials=tokens(3, 12),
    code="""
changed = x.clone()
changed[1:] = {other}[1:]
found = layer(changed, ctx).y[:1]
wanted = layer(x, ctx).y[:1]
""",
)
def rows(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    changed = x.clone()
    changed[1:] = case.other(x)[1:]
    return difference(case.run(changed).y[:1], case.run(x).y[:1]), EXACT, "row 0 changed with the rows after it"


def _if_causal(case: Case) -> str | None:
    if not case.subject.causal:
        return "is checked as an encoder"
    return None if case.per_token else "has one output per row"


def _cuts(case: Case) -> list[Trial]:
    return [plain(2, cut * case.unit, (12 - cut) * case.unit) for cut in (1, 6, 11)]


@law(
    "no output depends on a later token",
    needs=("rows",),
    applies=_if_causal,
    trials=_cuts,
    bar="from here on, other inputs",
    code="""
changed = x.clone()
changed[:, {cut}:] = {other}[:, {cut}:]
found = layer(changed, ctx).y[:, :{cut}]
wanted = layer(x, ctx).y[:, :{cut}]
""",
)
def causality(case: Case, trial: Trial) -> Finding | None:
    x, cut = case.x(trial), trial.parts[0]
    changed = x.clone()
    changed[:, cut:] = case.other(x)[:, cut:]
    gap = difference(case.run(changed).y[:, :cut], case.run(x).y[:, :cut])
    return gap, EXACT, "outputs changed with later tokens"


@law(
    "it returns the losses and the exports that it declares",
    needs=("shapes",),
    trials=tokens(2, 6),
    code="""
out = layer(x, ctx)
print(dict(out.losses), dict(out.exports), layer.capabilities)
""",
)
def declared(case: Case, trial: Trial) -> Finding | None:
    out = case.run(case.x(trial))
    owners = [("", case.layer), *descendants(case.layer)]
    losses = {f"{path}.{name}".lstrip(".") for path, owner in owners for name in owner.capabilities.losses}
    for what, wanted, found in (
        ("losses", losses, set(out.losses)),
        ("exports", set(case.capabilities.provides), set(out.exports)),
    ):
        if isinstance(case.layer, Layer) and wanted != found:
            raise Failure(f"declares the {what} {sorted(wanted) or 'none'} and returns {sorted(found) or 'none'}")
    return None


@law(
    "x leaves its mark: the output is not the same for every input",
    needs=("shapes",),
    trials=lambda case: [plain(2, 6 * case.unit + 2 * case.chunk)],
    code="""
print(layer(x, ctx).y)
print(layer({other}, ctx).y)
""",
)
def sensitivity(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    if x.numel() and not difference(case.run(case.other(x)).y, case.run(x).y):
        raise Failure("the output does not depend on the input")
    return None
