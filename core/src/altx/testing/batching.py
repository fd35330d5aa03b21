"""Laws of the context: padding, packing, resets, statistics."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from altx.adapters import Unpack
from altx.layer import Layer
from altx.testing.case import Case, Gap, difference, state_difference
from altx.testing.check import EXACT, Finding, if_masked, if_streaming, law, tokens
from altx.testing.trial import Trial


def _padded(case: Case) -> list[Trial]:
    """Twelve real tokens among twenty in each row, in every kind of place."""
    left, right = "." * 8 + "x" * 12, "x" * 12 + "." * 8
    mixed = ("x..xxx.x.xx.xxx.x..x", ".xx.x.xxx..xx.xxx.x.")
    # With a unit, each symbol is that many tokens.
    return [
        Trial(tuple("".join(token * case.unit for token in row) for row in rows))
        for rows in ((left, left), (right, left), mixed)
    ]


def _real(trial: Trial, x: Tensor) -> Tensor | None:
    """The real tokens of x alone, (B, n, ...); None where rows have not equally many."""
    if trial.mask is None:
        return x
    counts = trial.mask.sum(1)
    return x[trial.mask].unflatten(0, (trial.batch, int(counts[0]))) if bool((counts == counts[0]).all()) else None


def _rows(trial: Trial, y: Tensor) -> Tensor:
    """What came of the real tokens, (B, n, ...)."""
    return y if trial.mask is None else y[trial.mask].unflatten(0, (trial.batch, -1))


@law(
    "masked tokens change no output and no state",
    needs=("rows", "causality", "halves", "seen"),
    applies=if_masked,
    trials=_padded,
    code="""
alone = x[mask].unflatten(0, (len(x), -1))  # the real tokens
out = layer(x, ctx, start)
ref = layer(alone, ctx.replace(mask=None), start)
found, wanted = out.y[mask], ref.y.flatten(0, 1)
""",
    states=("out.state", "ref.state"),
)
def padding(case: Case, trial: Trial) -> Finding | None:
    x, ctx = case.x(trial), case.context(trial)
    real = _real(trial, x)
    if trial.mask is None or real is None or not real.shape[1]:
        return None
    out, alone = case.run(x, ctx), case.run(real)
    worst: float = difference(_rows(trial, out.y) if case.per_token else out.y, alone.y)
    if case.streams:
        out = case.run(x, ctx, case.state(trial.batch))
        wanted = case.carried(case.run(real, state=case.state(trial.batch)), case.state(trial.batch))
        if case.per_token:
            worst = max(worst, difference(_rows(trial, out.y), alone.y, "y with a state"))
        worst = max(worst, state_difference(case.carried(out, case.state(trial.batch)), wanted))
    if not bool(out.y.isfinite().all()):
        # A NaN at a masked token becomes one everywhere as soon as it is multiplied by zero.
        worst = Gap(float("inf"), "y", out.y, out.y.nan_to_num(0, 0, 0))
    return worst, EXACT, "padded tokens differ from the real ones alone"


@law(
    "a call whose every token is masked changes nothing",
    needs=("padding",),
    applies=if_masked,
    trials=lambda case: [Trial(("x" * 4 * case.unit + "." * 4 * case.unit,) * 2, (4 * case.unit, 4 * case.unit))],
    code="""
state = layer(x[:, :{cut}], plain, start).state
out = layer(x[:, {cut}:], ctx.slice({cut}, {length}), state)
found, wanted = out.y, out.y.nan_to_num(0, 0, 0)
""",
    states=("out.state", "state"),
)
def all_masked(case: Case, trial: Trial) -> Finding | None:
    x, cut = case.x(trial), trial.parts[0]
    if any(row != "x" * cut + "." * (trial.length - cut) for row in trial.rows) or cut == trial.length:
        return None
    nothing = case.context(trial).slice(cut, trial.length)
    state = None
    if case.streams:
        fresh = case.state(trial.batch)
        state = case.carried(case.run(x[:, :cut], state=fresh), fresh)
    out = case.run(x[:, cut:], nothing, state)
    for value in [out.y, *out.losses.values()]:
        if not bool(value.isfinite().all()):
            gap = Gap(float("inf"), "y", value, value.nan_to_num(0, 0, 0))
            return gap, 0.0, "masked tokens alone give a number that is not finite"
    if state is None:
        return 0.0, 0.0, ""
    return state_difference(case.carried(out, state), state), 0.0, "masked tokens alone changed the state"


def _if_both(case: Case) -> str | None:
    return if_streaming(case) or if_masked(case)


def _padded_calls(case: Case) -> list[Trial]:
    # A chunked layer's cuts fall on its grid only where no padding shifts it.
    parts = (7, 6, 7) if case.capabilities.split_multiple == 1 else (20,)
    return [Trial(trial.rows, tuple(n * case.unit for n in parts)) for trial in _padded(case)]


@law(
    "padding may fall anywhere in a stream of calls",
    needs=("padding", "steps"),
    applies=_if_both,
    trials=_padded_calls,
    parts="join",
    code="""
alone = x[mask].unflatten(0, (len(x), -1))  # the real tokens
ref = layer(alone, ctx.replace(mask=None), start)
state, ys = start, []
for a, b in {calls}:
    out = layer(x[:, a:b], ctx.slice(a, b), state)
    state = out.state or state
    ys.append(out.y)
found, wanted = torch.cat(ys, 1)[mask], ref.y.flatten(0, 1)
""",
    states=("state", "ref.state"),
)
def padding_across_calls(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    real = _real(trial, x)
    if trial.mask is None or real is None or not real.shape[1]:
        return None
    wanted = case.run(real, state=case.state(trial.batch))
    y, state = case.run_pieces(x, trial.parts, case.context(trial))
    worst: float = difference(_rows(trial, y), wanted.y, "y with a state") if case.per_token else 0.0
    worst = max(worst, state_difference(state, case.carried(wanted, case.state(trial.batch))))
    return worst, EXACT, "padded tokens in several calls differ from the real tokens in one"


@law(
    "masked tokens count in no loss and no metric",
    needs=("padding",),
    applies=if_masked,
    trials=_padded,
    code="""
alone = x[mask].unflatten(0, (len(x), -1))  # the real tokens
out = layer(x, ctx)
ref = layer(alone, ctx.replace(mask=None))
found = {**out.losses, **out.metrics}
wanted = {**ref.losses, **ref.metrics}
""",
)
def statistics(case: Case, trial: Trial) -> Finding | None:
    x = case.x(trial)
    real = _real(trial, x)
    if real is None or not real.shape[1]:
        return None
    alone, out = case.run(real), case.run(x, case.context(trial))
    wanted, found = {**alone.losses, **alone.metrics}, {**out.losses, **out.metrics}
    worst, nothing = 0.0, torch.zeros(())
    for name in wanted.keys() | found.keys():
        if name in wanted and name in found:
            gap = difference(found[name], wanted[name], name)
        else:
            gap = Gap(float("inf"), f"{name} (is not there in both)", nothing, nothing + 1)
        worst = max(worst, gap)
    # Metrics may be kept in float32.
    return worst, 1e-6, f"{getattr(worst, 'label', '')} changes with padding"


def _if_reset(case: Case) -> str | None:
    if not case.subject.causal:
        return "is checked as an encoder"
    return None if case.capabilities.reset else "declares that it takes no resets"


def _resets(case: Case) -> list[Trial]:
    rows = ("xxxxxRxxxxxx", "xxxxxxxxxRxx")
    found = [Trial(rows)]
    if case.streams and case.capabilities.split_multiple == 1:
        found.append(Trial(rows, (5, 1, 3, 3)))
    return [*found, Trial(rows).translated("R", "r")] if case.capabilities.masked else found


def _reset_code(trial: Trial, label: str) -> str:
    if trial.mask is not None:
        return """
found = layer(x, ctx).y[mask]
wanted = layer(x, ctx.replace(reset=reset & mask)).y[mask]
"""
    if trial.parts:
        return """
state, ys = start, []
for a, b in {calls}:
    out = layer(x[:, a:b], ctx.slice(a, b), state)
    state = out.state or state
    ys.append(out.y)
found, wanted = torch.cat(ys, 1), layer(x, ctx).y
"""
    piece = label.removeprefix("y")
    return f"""
found = layer(x, ctx).y{piece}
wanted = layer(x{piece}, ctx.replace(reset=None)).y
"""


@law(
    "a reset starts a fresh sequence",
    needs=("padding", "steps"),
    applies=_if_reset,
    trials=_resets,
    parts="join",
    code=_reset_code,
)
def reset(case: Case, trial: Trial) -> Finding | None:
    x, ctx = case.x(trial), case.context(trial)
    if trial.reset is None:
        return None
    whole = case.run(x, ctx).y
    if trial.mask is not None:
        masked = case.run(x, ctx.replace(reset=(trial.reset & trial.mask) if "R" in "".join(trial.rows) else None)).y
        gap = difference(whole[trial.mask], masked[trial.mask], "y at the real tokens")
        return gap, EXACT, "a reset at a masked token is one all the same"
    if trial.parts:
        y, _ = case.run_pieces(x, trial.parts, ctx)
        return (
            difference(y, whole, "y with a state"),
            EXACT,
            "with resets, several calls differ from one",
        )
    worst: float = 0.0
    for row in range(trial.batch):
        starts = [0, *(t for t in range(1, trial.length) if trial.rows[row][t] == "R"), trial.length]
        for start, stop in itertools.pairwise(starts):
            alone = case.run(x[row : row + 1, start:stop]).y
            label = f"y[{row}:{row + 1}, {start}:{stop}]"
            worst = max(worst, difference(whole[row : row + 1, start:stop], alone, label))
    return worst, EXACT, "a sequence that starts with a reset differs from the same tokens by themselves"


def _if_packing(case: Case) -> str | None:
    if not case.per_token:
        return "has one output per row"
    if case.capabilities.packing or case.capabilities.masked:
        return None
    return "takes neither packed nor padded batches"


def _packing_code(trial: Trial, label: str) -> str:
    code = """
from altx.adapters import Unpack

packed = layer if layer.capabilities.packing else Unpack(layer)
bounds = torch.tensor([0, *{ends}])
out = packed(x, ctx.replace(cu_seqlens=bounds), layer.init_state(len(bounds) - 1, dtype=torch.float64))
"""
    if not label.startswith("state of "):
        return f"""{code}found = out.y
wanted = torch.cat([layer(x[:, a:b], ctx).y for a, b in {{calls}}], 1)
"""
    start, stop = trial.borders()[number := int(label.split()[3].partition(".")[0])]
    leaf = label.partition(".")[2]
    return f"""{code}alone = layer(x[:, {start}:{stop}], ctx, layer.init_state(1, dtype=torch.float64))
found = out.state.select(torch.tensor([{number}])).flat()["{leaf}"]
wanted = alone.state.flat()["{leaf}"]
"""


@law(
    "sequences packed in one row do not see each other",
    needs=("padding", "steps", "select"),
    applies=_if_packing,
    trials=tokens(1, 5, 1, 8),
    bar="the next sequence",
    parts="join",
    code=_packing_code,
)
def packing(case: Case, trial: Trial) -> Finding | None:
    x, count = case.x(trial), len(trial.parts)
    if not count:
        return None
    cu = torch.tensor([0, *trial.parts]).cumsum(0)
    native = case.capabilities.packing or not isinstance(case.layer, Layer)
    layer = case.layer if native else Unpack(case.layer)
    with torch.no_grad():
        out = layer(x, case.ctx.replace(cu_seqlens=cu), case.state(count) if case.streams else None)
    alone = [case.run(x[:, a:b], state=case.state(1) if case.streams else None) for a, b in trial.borders()]
    worst: float = difference(out.y, torch.cat([one.y for one in alone], 1))
    for index, one in enumerate(alone):
        if case.streams and one.state is not None:
            if out.state is None:
                return float("inf"), EXACT, "a packed call with a state returned none"
            state = out.state.select(torch.tensor([index]))
            worst = max(worst, state_difference(state, one.state, f"state of sequence {index}"))
    return worst, EXACT, "packed sequences differ from each alone"
