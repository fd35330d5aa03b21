"""Laws of a bare memory, of what joins one, and of keys and values that serve more than once."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.attach import KVAttach
from altx.context import Context, SharedKV
from altx.memory import Memory, attended
from altx.model import Model
from altx.state import State
from altx.testing.case import Case, Failure, difference, state_difference
from altx.testing.check import EXACT, Finding, law
from altx.testing.partners import Ledger
from altx.testing.trial import Trial, plain


def _if_memory(case: Case) -> str | None:
    return None if case.subject.memory else "is not a memory"


def _scans(case: Case) -> list[Trial]:
    found = [plain(2, 9)]
    if case.memory.capabilities.masked:
        found.append(Trial(("..xxxxxxx", "xxxx.xxxx")))
    if case.memory.capabilities.reset:
        found.append(Trial(("xxxxxRxxx",) * 2))
    return found


@law(
    "scan equals the loop of reads and writes",
    needs=("shapes",),
    applies=_if_memory,
    trials=_scans,
    code="""
from altx.memory import Memory

start = memory.init_state(len(x), dtype=torch.float64)
out = memory.scan(x, start, ctx)
ref = Memory.scan(memory, x, start, ctx)
found, wanted = out.read.value, ref.read.value
""",
    states=("out.state", "ref.state"),
)
def scan(case: Case, trial: Trial) -> Finding | None:
    memory, ctx = case.memory, case.context(trial)
    x = case.told(trial)
    state = memory.init_state(trial.batch, dtype=torch.float64)
    with torch.no_grad():
        fast, loop = memory.scan(x, state, ctx), Memory.scan(memory, x, state, ctx)
    worst: float = state_difference(fast.state, loop.state)
    real = torch.ones(trial.batch, trial.length, dtype=torch.bool) if trial.mask is None else trial.mask
    found, wanted = ([read.value, *(read.attended or ())] for read in (fast.read, loop.read))
    for one, other in zip(found, wanted, strict=True):
        if one is not None and other is not None:
            worst = max(worst, difference(one[real], other[real], "what is read at the real tokens"))
    return worst, EXACT, "scan differs from the loop of reads and writes"


def _if_recalls(case: Case) -> str | None:
    if not case.subject.causal:
        return "is checked as an encoder"
    return None if case.capabilities.accepts_kv else "takes no keys and values of a memory"


def _recalls(case: Case) -> list[Trial]:
    return [plain(2, 4, 1, 4), Trial(("..xxx.xxx", "xxx.xxx.."))]


def _recall_code(trial: Trial, label: str) -> str:
    code = """
from altx.attach import KVAttach
from altx.testing.partners import Ledger

joined = KVAttach(layer, Ledger(layer.hands)).double()
start = joined.init_state(len(x), dtype=torch.float64)
out = joined(x, ctx, start)
"""
    if trial.mask is not None:
        return f"""{code}alone = joined(x[mask].unflatten(0, (len(x), -1)), plain, start)
found, wanted = out.y[mask], alone.y.flatten(0, 1)
"""
    if not label:
        return f"{code}print(out.y, layer(x, ctx).y)"
    return f"""{code}state, ys = start, []
for a, b in {{calls}}:
    one = joined(x[:, a:b], ctx, state)
    state = one.state
    ys.append(one.y)
found, wanted = torch.cat(ys, 1), out.y
"""


@law(
    "keys and values of a memory join its softmax, whatever the calls",
    needs=("splits", "padding"),
    applies=_if_recalls,
    trials=_recalls,
    parts="drop",
    code=_recall_code,
    states=("state", "out.state"),
)
def recall(case: Case, trial: Trial) -> Finding | None:
    if case.layer.hands is None:
        raise Failure("declares accepts_kv, and does not say in `hands` what it hands to a memory")
    layer, x, ctx = KVAttach(case.layer, Ledger(case.layer.hands)).double(), case.x(trial), case.context(trial)

    def run(x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        with torch.no_grad():
            out = layer(x, ctx, state)
        assert out.state
        return out.y, out.state

    fresh = layer.init_state(trial.batch, dtype=torch.float64)
    whole, end = run(x, ctx, fresh)
    if trial.mask is not None:
        # With masked tokens before and between, the real ones read the same.
        counts = trial.mask.sum(1)
        if not bool((counts == counts[0]).all()):
            return None
        alone, _ = run(x[trial.mask].unflatten(0, (trial.batch, -1)), case.ctx, fresh)
        gap = difference(whole[trial.mask].reshape(alone.shape), alone, "y at the real tokens")
        return gap, EXACT, "with a memory, padded tokens differ from the real ones alone"
    if trial.length > 1 and not difference(whole, case.run(x).y):
        raise Failure("a memory's keys and values change nothing")
    shut = case.ctx.replace(recall=lambda q, k, v, _: attended(q, k[:, None], v[:, None])._replace(share=q[..., 0] * 0))
    if difference(case.run(x, shut).y, case.run(x).y) > EXACT:
        raise Failure("a memory whose gate is shut changes something: `Attended.share` says how much of it to take")
    state, ys = fresh, []
    for start, stop in trial.borders():
        y, state = run(x[:, start:stop], case.ctx, state)
        ys.append(y)
    worst = max(difference(torch.cat(ys, 1), whole, "y with a state"), state_difference(state, end))
    return worst, EXACT, "with a memory, several calls differ from one"


def _if_shares_kv(case: Case) -> str | None:
    if isinstance(case.layer, Model) or not case.capabilities.shares_kv or case.capabilities.growth == "none":
        return "shares no keys and values of its own"
    return None


OTHERS = "y at the other tokens"


def _sharing_code(trial: Trial, label: str) -> str:
    real = "" if trial.mask is not None else "mask = torch.ones_like(x[..., 0]).bool()\n"
    code = f"""
from altx.context import SharedKV

{real}kv, own = SharedKV({{}}), torch.arange(x.shape[1]).expand(len(x), -1)
first = layer(x, plain.replace(shared_kv=kv), start)
again = ctx.replace(shared_kv=SharedKV(kv.kept, own))
"""
    if label == OTHERS:
        return f"""{code}one = mask & (mask.cumsum(1) == 1)
changed = layer(torch.where(one[..., None], {{other}}, x), again)
found, wanted = changed.y[mask & ~one], first.y[mask & ~one]
"""
    return f"{code}found, wanted = layer(x, again).y[mask], first.y[mask]\n"


@law(
    "keys and values of the first application serve the later ones",
    needs=("padding",),
    applies=_if_shares_kv,
    trials=lambda case: [Trial((".xx.xxx.", "xxxx...x")), Trial(("xxxxxx",))],
    code=_sharing_code,
)
def kv_sharing(case: Case, trial: Trial) -> Finding | None:
    x, state = case.x(trial), case.state(trial.batch) if case.streams else None
    mask = torch.ones(trial.batch, trial.length, dtype=torch.bool) if trial.mask is None else trial.mask
    kv, own = SharedKV({}), torch.arange(trial.length).expand(trial.batch, -1)
    first = case.run(x, case.ctx.replace(shared_kv=kv), state)
    again = case.ctx.replace(mask=trial.mask, shared_kv=SharedKV(kv.kept, own))
    # Some of the tokens see what all saw, so what comes of them is the same.
    some = difference(case.run(x, again).y[mask], first.y[mask], "y at the real tokens")
    if some > EXACT:
        return some, EXACT, "some of the tokens, applied again, do not see all that took part in the first application"
    one = mask & (mask.cumsum(1) == 1)
    changed = case.run(torch.where(one[..., None], case.other(x), x), again).y
    others = difference(changed[mask & ~one], first.y[mask & ~one], OTHERS)
    return others, EXACT, "what a token has become since the first application is seen by others"
