"""Laws of the context: padding, packing, resets, statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.adapters import Unpack
from altx.layer import Layer
from altx.testing.case import Case, difference, padded, state_difference
from altx.testing.check import EXACT, Finding, if_masked, if_streaming, law


def _masks(real: int, total: int) -> list[tuple[str, Tensor]]:
    """Masks (2, total) with `real` True in each row, in every kind of place."""
    left = torch.arange(total) >= total - real
    right = torch.arange(total) < real
    generator = torch.Generator().manual_seed(3)
    mixed = torch.zeros(2, total, dtype=torch.bool)
    for row in range(2):
        mixed[row, torch.randperm(total, generator=generator)[:real]] = True
    return [("left", torch.stack([left, left])), ("right and left", torch.stack([right, left])), ("interior", mixed)]


@law("masked tokens change no output and no state", needs=("rows", "causality", "halves", "seen"), applies=if_masked)
def padding(case: Case) -> Finding | None:
    real, total = 12 * case.unit, 20 * case.unit
    x, filling = case.inputs(2, real), case.inputs(2, total, seed=1)
    worst, place = 0.0, ""
    for name, mask in _masks(real, total):
        spread, ctx = padded(x, mask, filling), case.ctx.replace(mask=mask)
        out, alone = case.run(spread, ctx), case.run(x)
        y = out.y[mask].reshape(2, real, -1) if case.per_token else out.y
        found = difference(y, alone.y)
        if case.streams:
            out = case.run(spread, ctx, case.state(2))
            wanted = case.carried(case.run(x, state=case.state(2)), case.state(2))
            found = max(
                found,
                difference(out.y[mask].reshape(2, real, -1), alone.y) if case.per_token else 0.0,
                state_difference(case.carried(out, case.state(2)), wanted),
            )
        if not bool(out.y.isfinite().all()):
            found = float("inf")
        if found > worst:
            worst, place = found, name
    return worst, EXACT, f"{real} tokens padded to {total} ({place}) differ from the {real} tokens alone"


@law("a call whose every token is masked changes nothing", needs=("padding",), applies=if_masked)
def all_masked(case: Case) -> Finding | None:
    x = case.inputs(2, 4 * case.unit)
    nothing = case.ctx.replace(mask=torch.zeros(2, 4 * case.unit, dtype=torch.bool))
    out = case.run(x, nothing)
    bad = not all(bool(t.isfinite().all()) for t in [out.y, *out.losses.values()])
    if not case.streams:
        return float("inf") if bad else 0.0, 0.0, "NaN where every token is masked"
    state = case.carried(case.run(x, state=case.state(2)), case.state(2))
    after = case.carried(case.run(x, nothing, state), state)
    return (
        float("inf") if bad else state_difference(after, state),
        0.0,
        "masked tokens alone changed the state, or gave NaN",
    )


def _if_both(case: Case) -> str | None:
    return if_streaming(case) or if_masked(case)


@law("padding may fall anywhere in a stream of calls", needs=("padding", "steps"), applies=_if_both)
def padding_across_calls(case: Case) -> Finding | None:
    real, total = 12 * case.unit, 20 * case.unit
    x, filling = case.inputs(2, real), case.inputs(2, total, seed=1)
    # A chunked layer's cuts fall on its grid only where no padding shifts it.
    lengths = [7, 6, 7] if case.capabilities.split_multiple == 1 else [total // case.unit]
    worst, place = 0.0, ""
    wanted = case.run(x, state=case.state(2))
    for name, mask in _masks(real, total):
        y, state = case.run_pieces(
            padded(x, mask, filling), [n * case.unit for n in lengths], case.ctx.replace(mask=mask)
        )
        found = difference(y[mask].reshape(2, real, -1), wanted.y) if case.per_token else 0.0
        found = max(found, state_difference(state, case.carried(wanted, case.state(2))))
        if found > worst:
            worst, place = found, name
    return worst, EXACT, f"padded tokens ({place}) in calls of {lengths} differ from the real tokens in one call"


@law("masked tokens count in no loss and no metric", needs=("padding",), applies=if_masked)
def statistics(case: Case) -> Finding | None:
    real, total = 12 * case.unit, 20 * case.unit
    x, filling = case.inputs(2, real), case.inputs(2, total, seed=1)
    alone = case.run(x)
    wanted = {**alone.losses, **alone.metrics}
    worst, what = 0.0, ""
    for _, mask in _masks(real, total):
        out = case.run(padded(x, mask, filling), case.ctx.replace(mask=mask))
        found = {**out.losses, **out.metrics}
        for name in wanted.keys() | found.keys():
            same = name in wanted and name in found
            gap = difference(found[name], wanted[name]) if same else float("inf")
            if gap > worst:
                worst, what = gap, name
    # Metrics may be kept in float32.
    return worst, 1e-6, f"{what} changes with padding"


def _if_reset(case: Case) -> str | None:
    if not case.subject.causal:
        return "is checked as an encoder"
    return None if case.capabilities.reset else "declares that it takes no resets"


@law("a reset starts a fresh sequence", needs=("padding", "steps"), applies=_if_reset)
def reset(case: Case) -> Finding | None:
    x = case.inputs(2, 12)
    flags = torch.zeros(2, 12, dtype=torch.bool)
    flags[0, 5] = flags[1, 9] = True
    fresh = [case.run(x[:1, 5:]).y, case.run(x[1:, 9:]).y]
    whole = case.run(x, case.ctx.replace(reset=flags)).y
    worst = max(difference(whole[:1, 5:], fresh[0]), difference(whole[1:, 9:], fresh[1]))
    worst = max(worst, difference(whole[:1, :5], case.run(x[:1, :5]).y))
    if case.streams and case.capabilities.split_multiple == 1:
        y, _ = case.run_pieces(x, [5, 1, 3, 3], case.ctx.replace(reset=flags))
        worst = max(worst, difference(y, whole))
    if worst <= EXACT and case.capabilities.masked:
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[0, 5] = mask[1, 9] = False
        both, masked = case.run(x, case.ctx.replace(reset=flags, mask=mask)), case.run(x, case.ctx.replace(mask=mask))
        return difference(both.y[mask], masked.y[mask]), EXACT, "a reset at a masked token is one all the same"
    return worst, EXACT, "the tokens after a reset differ from the same tokens as a sequence of their own"


def _if_packing(case: Case) -> str | None:
    if not case.per_token:
        return "has one output per row"
    if case.capabilities.packing or case.capabilities.masked:
        return None
    return "takes neither packed nor padded batches"


@law("sequences packed in one row do not see each other", needs=("padding", "steps", "select"), applies=_if_packing)
def packing(case: Case) -> Finding | None:
    lengths = [n * case.unit for n in (5, 1, 8)]
    x = case.inputs(1, sum(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    native = case.capabilities.packing or not isinstance(case.layer, Layer)
    layer = case.layer if native else Unpack(case.layer)
    ctx = case.ctx.replace(cu_seqlens=cu)
    with torch.no_grad():
        out = layer(x, ctx, case.state(3) if case.streams else None)
    worst = 0.0
    for index in range(3):
        piece = x[:, cu[index] : cu[index + 1]]
        alone = case.run(piece, state=case.state(1) if case.streams else None)
        worst = max(worst, difference(out.y[:, cu[index] : cu[index + 1]], alone.y))
        if case.streams and alone.state is not None:
            if out.state is None:
                return float("inf"), EXACT, "a packed call with a state returned none"
            worst = max(worst, state_difference(out.state.select(torch.tensor([index])), alone.state))
    return worst, EXACT, f"sequences of {lengths} tokens packed together differ from each alone"
