"""Laws of the state: parallel, in chunks and one by one are the same computation."""

from __future__ import annotations

import torch

from altx.context import Context
from altx.errors import StateError
from altx.state import State
from altx.testing.case import Case, difference, state_difference
from altx.testing.check import EXACT, Failure, Finding, if_streaming, law


def _compare_pieces(case: Case, lengths: list[int]) -> Finding:
    total = sum(lengths)
    x = case.inputs(2, total)
    full = case.run(x, state=case.state(2))
    y, state = case.run_pieces(x, lengths)
    worst = difference(y, full.y)
    at_end = state_difference(state, case.carried(full, case.state(2)))
    what = "outputs" if worst > EXACT else "final states"
    return max(worst, at_end), EXACT, f"{what} of {total} tokens at once and in calls of {lengths} differ"


@law("an initial state changes nothing: it is a fresh sequence", needs=("causality", "unmutated"), applies=if_streaming)
def initial_state(case: Case) -> Finding | None:
    x = case.inputs(2, 12 * case.unit)
    out = case.run(x, state=case.state(2))
    case.carried(out, case.state(2))
    return difference(out.y, case.run(x).y), EXACT, "with init_state() and with state=None the outputs differ"


@law("two halves equal the whole", needs=("initial-state",), applies=if_streaming)
def halves(case: Case) -> Finding | None:
    return _compare_pieces(case, [6 * case.unit, 6 * case.unit])


@law("any split equals the whole", needs=("halves",), applies=if_streaming)
def splits(case: Case) -> Finding | None:
    findings = [
        _compare_pieces(case, [n * case.unit for n in lengths]) for lengths in ([5, 4, 3], [3, 9], [7, 2, 3], [2, 2, 8])
    ]
    return max(findings, key=lambda finding: finding[0])


def _if_steps(case: Case) -> str | None:
    return if_streaming(case) or (None if case.capabilities.steps else "cannot be fed single tokens")


@law("parallel = one token at a time", needs=("splits",), applies=_if_steps)
def steps(case: Case) -> Finding | None:
    return _compare_pieces(case, [1] * 12)


@law("no tokens change nothing", needs=("initial-state",), applies=if_streaming)
def empty(case: Case) -> Finding | None:
    before = case.carried(case.run(case.inputs(2, 4 * case.unit), state=case.state(2)), case.state(2))
    out = case.run(case.inputs(2, 0), state=before)
    if case.per_token and out.y.shape[:2] != (2, 0):
        raise Failure(f"y of 0 tokens is {tuple(out.y.shape)}")
    return state_difference(case.carried(out, before), before), 0.0, "the state changed with 0 tokens"


@law("seen counts each row's real tokens", needs=("initial-state",), applies=if_streaming)
def seen(case: Case) -> Finding | None:
    mask = torch.ones(2, 8 * case.unit, dtype=torch.bool)
    if case.capabilities.masked:
        mask[0, : 3 * case.unit] = False
    x = case.inputs(2, 8 * case.unit)
    ctx = case.ctx.replace(mask=mask) if case.capabilities.masked else case.ctx
    state = case.carried(case.run(x, ctx, case.state(2)), case.state(2))
    if case.capabilities.growth != "none" and state.tokens is None:
        raise Failure("its state has no count of the tokens seen")
    if state.tokens is not None and not torch.equal(state.tokens, mask.sum(1)):
        raise Failure(f"after {mask.sum(1).tolist()} real tokens, seen is {state.tokens.tolist()}")
    return None


@law("reordering, forking and repeating rows of a state is exact", needs=("halves",), applies=if_streaming)
def select(case: Case) -> Finding | None:
    first, second = case.inputs(3, 6 * case.unit), case.inputs(3, 6 * case.unit, seed=1)
    state = case.carried(case.run(first, state=case.state(3)), case.state(3))
    index = torch.tensor([2, 0, 0, 1])
    worst = 0.0
    try:
        for picked, order in ((state.select(index), index), (state.repeat(2), torch.arange(3).repeat_interleave(2))):
            there = case.run(second[order], state=picked).y
            fresh = case.carried(case.run(first[order], state=case.state(len(order))), case.state(len(order)))
            worst = max(worst, difference(there, case.run(second[order], state=fresh).y))
    except (RuntimeError, IndexError) as error:
        raise Failure(
            f"continuing from rows {index.tolist()} of a state raised {type(error).__name__}: {error}"
        ) from error
    return worst, EXACT, "continuing from reordered rows of a state differs from rows that were so from the start"


@law("dropping the last tokens is exact or refused", needs=("halves",), applies=if_streaming)
def rollback(case: Case) -> Finding | None:
    long, short = case.inputs(2, 8 * case.unit), 5 * case.unit
    state = case.carried(case.run(long, state=case.state(2)), case.state(2))
    declared = case.capabilities.rollback
    try:
        cropped = state.crop(3 * case.unit)
    except StateError:
        if declared == "crop":
            raise Failure("declares rollback 'crop', and its state refuses to crop") from None
        return None
    if declared == "snapshot":
        raise Failure("declares rollback 'snapshot', and its state does not refuse to crop")
    wanted = case.carried(case.run(long[:, :short], state=case.state(2)), case.state(2))
    after = case.inputs(2, 4 * case.unit, seed=1)
    worst = difference(case.run(after, state=cropped).y, case.run(after, state=wanted).y)
    return max(worst, state_difference(cropped, wanted)), EXACT, "after crop(3) the state is not that of 3 tokens less"


@law("a state saved and restored continues the same", needs=("halves",), applies=if_streaming)
def save_restore(case: Case) -> Finding | None:
    x, after = case.inputs(2, 6 * case.unit), case.inputs(2, 4 * case.unit, seed=1)
    state = case.carried(case.run(x, state=case.state(2)), case.state(2))
    restored = state.from_flat({name: tensor.clone() for name, tensor in state.flat().items()})
    return (
        difference(case.run(after, state=restored).y, case.run(after, state=state).y),
        0.0,
        "a restored state continues differently",
    )


@law("reserved room and donated storage change nothing", needs=("steps",), applies=_if_steps)
def donation(case: Case) -> Finding | None:
    x = case.inputs(2, 10)
    y, state = case.run_pieces(x, [4] + [1] * 6)
    reserved: State = case.state(2, capacity=10)
    out = case.run(x[:, :4], case.ctx, reserved)
    outputs = [out.y]
    for t in range(4, 10):
        out = case.run(
            x[:, t : t + 1], Context(causal=case.subject.causal, donate_state=True), case.carried(out, reserved)
        )
        outputs.append(out.y)
    worst = max(difference(torch.cat(outputs, 1), y), state_difference(case.carried(out, reserved), state))
    return worst, EXACT, "steps on donated storage differ from functional steps"


@law("the state grows as declared", needs=("initial-state",), applies=if_streaming)
def growth(case: Case) -> Finding | None:
    declared = case.capabilities.growth
    # A window may be long, and is full in the end.
    lengths = (64, 1024, 1984) if declared == "window" else (64, 128, 192)
    sizes = []
    for length in lengths:
        x = case.inputs(1, length * case.unit)
        sizes.append(case.carried(case.run(x, state=case.state(1)), case.state(1)).bytes())
    true = {
        "none": sizes[2] == 0,
        "constant": 0 < sizes[0] == sizes[1] == sizes[2],
        "window": 0 < sizes[0] <= sizes[1] == sizes[2],
        "linear": 0 < sizes[1] - sizes[0] == sizes[2] - sizes[1],
    }
    if not true[declared]:
        counts = " and ".join(f"{length:,}" for length in lengths)
        raise Failure(f"declares growth {declared!r}; after {counts} tokens the state has {sizes} bytes")
    return None
