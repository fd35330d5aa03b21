"""Laws of the state: parallel, in chunks and one by one are the same computation."""

from __future__ import annotations

import torch

from altx.errors import StateError
from altx.recursion import Recursion
from altx.routed import Routed
from altx.testing.case import Case, Failure, difference, state_difference
from altx.testing.check import EXACT, Finding, if_streaming, law, tokens
from altx.testing.trial import Trial, plain

IN_CALLS = """
ref = layer(x, ctx, start)
state, ys = start, []
for a, b in {calls}:
    out = layer(x[:, a:b], ctx, state)
    state = out.state or state
    ys.append(out.y)
found, wanted = torch.cat(ys, 1), ref.y
"""
WITH = "y with a state"
SAME = ("state", "ref.state")


def _compare_pieces(case: Case, trial: Trial) -> Finding | None:
    if not trial.length:
        return None
    x = case.x(trial)
    full = case.run(x, state=case.state(trial.batch))
    y, state = case.run_pieces(x, trial.parts or (trial.length,))
    outputs = difference(y, full.y, WITH)
    states = state_difference(state, case.carried(full, case.state(trial.batch)))
    what = "outputs" if outputs > EXACT else "states at the end"
    return max(outputs, states), EXACT, f"the {what} of several calls and of one call differ"


@law(
    "an initial state changes nothing: it is a fresh sequence",
    needs=("causality", "unmutated"),
    applies=if_streaming,
    trials=tokens(2, 12),
    code="""
found = layer(x, ctx, layer.init_state(len(x), dtype=torch.float64)).y
wanted = layer(x, ctx).y
""",
)
def initial_state(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    out = case.run(x, state=case.state(trial.batch))
    case.carried(out, case.state(trial.batch))
    return difference(out.y, case.run(x).y), EXACT, "with init_state() and with state=None the outputs differ"


@law(
    "two halves equal the whole",
    needs=("initial-state",),
    applies=if_streaming,
    trials=tokens(2, 6, 6),
    code=IN_CALLS,
    states=SAME,
)
def halves(case: Case, trial: Trial) -> Finding | None:
    return _compare_pieces(case, trial)


def _splits(case: Case) -> list[Trial]:
    return [plain(2, *(n * case.unit for n in parts)) for parts in ((5, 4, 3), (3, 9), (7, 2, 3), (2, 2, 8))]


@law(
    "any split equals the whole",
    needs=("halves",),
    applies=if_streaming,
    trials=_splits,
    parts="join",
    code=IN_CALLS,
    states=SAME,
)
def splits(case: Case, trial: Trial) -> Finding | None:
    return _compare_pieces(case, trial)


def _if_steps(case: Case) -> str | None:
    return if_streaming(case) or (None if case.capabilities.steps else "cannot be fed single tokens")


@law(
    "parallel = one token at a time",
    needs=("splits",),
    applies=_if_steps,
    trials=lambda case: [plain(2, *[1] * 12)],
    parts="drop",
    code=IN_CALLS,
    states=SAME,
)
def steps(case: Case, trial: Trial) -> Finding | None:
    return _compare_pieces(case, trial)


@law(
    "no tokens change nothing",
    needs=("initial-state",),
    applies=if_streaming,
    trials=tokens(2, 4, 0),
    code="""
before = layer(x[:, :{cut}], ctx, start).state
out = layer(x[:, :0], ctx, before)
found, wanted = out.state.flat(), before.flat()
""",
)
def empty(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    before = case.carried(case.run(x, state=case.state(trial.batch)), case.state(trial.batch))
    out = case.run(x[:, :0], state=before)
    if case.per_token and out.y.shape[:2] != (trial.batch, 0):
        raise Failure("y of 0 tokens has some", f"y is {tuple(out.y.shape)}")
    return state_difference(case.carried(out, before), before), 0.0, "the state changed with 0 tokens"


def _counted(case: Case) -> list[Trial]:
    masked = case.capabilities.masked
    return [Trial((("..." if masked else "xxx") * case.unit + "x" * 5 * case.unit, "x" * 8 * case.unit))]


@law(
    "seen counts each row's real tokens",
    needs=("initial-state",),
    applies=if_streaming,
    trials=_counted,
    code="""
found = layer(x, ctx, start).state.tokens
wanted = ctx.lengths(x)
""",
)
def seen(case: Case, trial: Trial) -> Finding | None:
    x, ctx = case.x(trial), case.context(trial)
    state = case.carried(case.run(x, ctx, case.state(trial.batch)), case.state(trial.batch))
    if case.capabilities.growth != "none" and state.tokens is None:
        raise Failure("its state has no count of the tokens seen")
    wanted = ctx.lengths(x)
    if state.tokens is not None and not torch.equal(state.tokens, wanted):
        raise Failure(
            "seen is not the number of real tokens",
            f"state.seen is {state.tokens.tolist()}, expected {wanted.tolist()}",
        )
    return None


@law(
    "reordering, forking and repeating rows of a state is exact",
    needs=("halves",),
    applies=if_streaming,
    trials=tokens(3, 6, 6),
    bar="goes on from the rows in another order",
    code="""
order = torch.tensor({order})
state = layer(x[:, :{cut}], ctx, start).state.select(order)
found = layer(x[order, {cut}:], ctx, state).y
fresh = layer(x[order, :{cut}], ctx, layer.init_state(len(order), dtype=torch.float64)).state
wanted = layer(x[order, {cut}:], ctx, fresh).y
""",
)
def select(case: Case, trial: Trial) -> Finding | None:
    x, cut, rows = case.x(trial), trial.parts[0], trial.batch
    first, second = x[:, :cut], x[:, cut:]
    state = case.carried(case.run(first, state=case.state(rows)), case.state(rows))
    index = torch.tensor(order_of(rows))
    worst: float = 0.0
    try:
        for picked, order in ((state.select(index), index), (state.repeat(2), torch.arange(rows).repeat_interleave(2))):
            there = case.run(second[order], state=picked).y
            fresh = case.carried(case.run(first[order], state=case.state(len(order))), case.state(len(order)))
            worst = max(worst, difference(there, case.run(second[order], state=fresh).y, WITH))
    except (RuntimeError, IndexError) as error:
        raise Failure(
            "continuing from chosen rows of a state fails", f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return worst, EXACT, "continuing from reordered rows of a state differs from rows that were so from the start"


def order_of(rows: int) -> list[int]:
    """Rows in another order, one of them twice."""
    return [rows - 1, 0, 0, *range(1, rows - 1)]


@law(
    "dropping the last tokens is exact or refused",
    needs=("halves",),
    applies=if_streaming,
    trials=tokens(2, 5, 3, 4),
    bar="first what is dropped, then what goes on",
    code="""
a, b = {cuts}
state = layer(x[:, :b], ctx, start).state.crop(b - a)
found = layer(x[:, b:], ctx, state).y
wanted = layer(x[:, b:], ctx, layer(x[:, :a], ctx, start).state).y
""",
    states=("state", "layer(x[:, :a], ctx, start).state"),
)
def rollback(case: Case, trial: Trial) -> Finding | None:
    x, (kept, dropped, _), rows = case.x(trial), trial.parts, trial.batch
    if not dropped:
        return None
    state = case.carried(case.run(x[:, : kept + dropped], state=case.state(rows)), case.state(rows))
    declared = case.capabilities.rollback
    try:
        cropped = state.crop(dropped)
    except StateError as error:
        if declared == "crop":
            raise Failure(
                "declares rollback 'crop', and its state refuses to crop", str(error).splitlines()[0]
            ) from None
        return None
    if declared == "snapshot":
        raise Failure("declares rollback 'snapshot', and its state does not refuse to crop")
    wanted = case.carried(case.run(x[:, :kept], state=case.state(rows)), case.state(rows))
    after = x[:, kept + dropped :]
    worst = difference(case.run(after, state=cropped).y, case.run(after, state=wanted).y, WITH)
    return max(worst, state_difference(cropped, wanted)), EXACT, "after a crop the state is not that of fewer tokens"


@law(
    "a state saved and restored continues the same",
    needs=("halves",),
    applies=if_streaming,
    trials=tokens(2, 6, 4),
    bar="saved and restored",
    code="""
state = layer(x[:, :{cut}], ctx, start).state
restored = state.from_flat({name: tensor.clone() for name, tensor in state.flat().items()})
found = layer(x[:, {cut}:], ctx, restored).y
wanted = layer(x[:, {cut}:], ctx, state).y
""",
)
def save_restore(case: Case, trial: Trial) -> Finding | None:
    x, cut = case.x(trial), trial.parts[0]
    state = case.carried(case.run(x[:, :cut], state=case.state(trial.batch)), case.state(trial.batch))
    restored = state.from_flat({name: tensor.clone() for name, tensor in state.flat().items()})
    gap = difference(case.run(x[:, cut:], state=restored).y, case.run(x[:, cut:], state=state).y, WITH)
    return gap, 0.0, "a restored state continues differently"


@law(
    "reserved room and donated storage change nothing",
    needs=("steps",),
    applies=_if_steps,
    trials=lambda case: [plain(2, 4, *[1] * 6)],
    parts="drop",
    states=SAME,
    code="""
ref = layer(x, ctx, start)
state, ys = layer.init_state(len(x), capacity={length}, dtype=torch.float64), []
for a, b in {calls}:
    out = layer(x[:, a:b], ctx.replace(donate_state=a > 0), state)
    state = out.state or state
    ys.append(out.y)
found, wanted = torch.cat(ys, 1), ref.y
""",
)
def donation(case: Case, trial: Trial) -> Finding | None:
    if not trial.length:
        return None
    x = case.x(trial)
    y, state = case.run_pieces(x, trial.parts)
    reserved, outputs = case.state(trial.batch, capacity=trial.length), []
    for start, stop in trial.borders():
        ctx = case.ctx if not start else case.ctx.replace(donate_state=True)
        out = case.run(x[:, start:stop], ctx, reserved)
        reserved = case.carried(out, reserved)
        outputs.append(out.y)
    worst = max(difference(torch.cat(outputs, 1), y, WITH), state_difference(reserved, state))
    return worst, EXACT, "steps on donated storage differ from functional steps"


def _growing(case: Case) -> list[Trial]:
    # A window may be long, and is full in the end.
    parts = (64, 960, 960) if case.capabilities.growth == "window" else (64, 64, 64)
    return [plain(1, *(n * case.unit for n in parts))]


@law(
    "the state grows as declared",
    needs=("initial-state",),
    applies=if_streaming,
    trials=_growing,
    bar="the size is looked at again",
    code="""
for length in {ends}:
    state = layer(x[:, :length], ctx, layer.init_state(1, dtype=torch.float64)).state
    print(length, "tokens:", state.bytes() if state else 0, "bytes")
""",
)
def growth(case: Case, trial: Trial) -> Finding | None:
    declared, x = case.capabilities.growth, case.x(trial)
    if declared in ("window", "linear") and trial not in _growing(case):
        return None  # where a state grows in steps, a few tokens show nothing
    lengths = [stop for _, stop in trial.borders()]
    sizes = [case.carried(case.run(x[:, :n], state=case.state(1)), case.state(1)).bytes() for n in lengths]
    true = {
        "none": sizes[2] == 0,
        "constant": 0 < sizes[0] == sizes[1] == sizes[2],
        "window": 0 < sizes[0] <= sizes[1] == sizes[2],
        "linear": 0 < sizes[1] - sizes[0] == sizes[2] - sizes[1],
    }
    room, parts = "", [part for part in case.layer.modules() if isinstance(part, (Routed, Recursion))]
    if any(part.capabilities.growth == "linear" for part in parts):
        # What gets some of the tokens grows by at most as much as if it got all, and by nothing without any.
        most = [case.state(1, capacity=n).bytes() for n in lengths]
        within = all(size <= bound for size, bound in zip(sizes, most, strict=True))
        true["linear"] = within and sizes[0] <= sizes[1] <= sizes[2] and sizes[0] < sizes[2]
        room = f", of at most {most}"
    if not true[declared]:
        counts = " and ".join(f"{length:,}" for length in lengths)
        raise Failure(f"declares growth {declared!r}", f"after {counts} tokens the state has {sizes} bytes{room}")
    return None
