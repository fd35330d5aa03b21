"""Laws of a bare memory, and of what joins one."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.attach import KVAttach
from altx.context import Context
from altx.memory import Memory, attended
from altx.state import State
from altx.testing.case import Case, agitate, difference, state_difference
from altx.testing.check import EXACT, Failure, Finding, law
from altx.testing.partners import Ledger


def _if_memory(case: Case) -> str | None:
    return None if case.subject.memory else "is not a memory"


@law("scan equals the loop of reads and writes", applies=_if_memory)
def scan(case: Case) -> Finding | None:
    assert case.subject.memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        memory = case.subject.memory().double()
    agitate(memory)
    width = case.subject.width or case.subject.dim
    x = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = mask[1, 4] = False
    worst = 0.0
    contexts = [case.ctx, case.ctx.replace(mask=mask)] if memory.capabilities.masked else [case.ctx]
    if memory.capabilities.reset:
        flags = torch.zeros(2, 9, dtype=torch.bool)
        flags[:, 5] = True
        contexts.append(case.ctx.replace(reset=flags))
    for ctx in contexts:
        state = memory.init_state(2, dtype=torch.float64)
        with torch.no_grad():
            fast, plain = memory.scan(x, state, ctx), Memory.scan(memory, x, state, ctx)
        worst = max(worst, state_difference(fast.state, plain.state))
        real = mask if ctx.mask is not None else torch.ones_like(mask)
        found, wanted = ([read.value, *(read.attended or ())] for read in (fast.read, plain.read))
        for one, other in zip(found, wanted, strict=True):
            if one is not None and other is not None:
                worst = max(worst, difference(one[real], other[real]))
    return worst, EXACT, "scan differs from the loop of reads and writes"


def _if_recalls(case: Case) -> str | None:
    if not case.subject.causal:
        return "is checked as an encoder"
    return None if case.capabilities.accepts_kv else "takes no keys and values of a memory"


@law(
    "keys and values of a memory join its softmax, whatever the calls", needs=("splits", "padding"), applies=_if_recalls
)
def recall(case: Case) -> Finding | None:
    if case.layer.hands is None:
        raise Failure("declares accepts_kv, and does not say in `hands` what it hands to a memory")
    layer, x = KVAttach(case.layer, Ledger(case.layer.hands)).double(), case.inputs(2, 9)

    def run(x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        with torch.no_grad():
            out = layer(x, ctx, state)
        assert out.state
        return out.y, out.state

    fresh = layer.init_state(2, dtype=torch.float64)
    whole, end = run(x, case.ctx, fresh)
    if difference(whole, case.run(x).y) == 0:
        raise Failure("a memory's keys and values change nothing")
    shut = case.ctx.replace(recall=lambda q, k, v, _: attended(q, k[:, None], v[:, None])._replace(share=q[..., 0] * 0))
    if difference(case.run(x, shut).y, case.run(x).y) > EXACT:
        raise Failure("a memory whose gate is shut changes something: `Attended.share` says how much of it to take")
    state, ys = fresh, []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        y, state = run(x[:, start:stop], case.ctx, state)
        ys.append(y)
    worst = max(difference(torch.cat(ys, 1), whole), state_difference(state, end))
    # With masked tokens before and between, the real ones read the same.
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    real = torch.stack([row[there] for row, there in zip(x, mask, strict=True)])
    y, _ = run(x, case.ctx.replace(mask=mask), fresh)
    alone, _ = run(real, case.ctx, fresh)
    return max(worst, difference(y[mask].reshape(alone.shape), alone)), EXACT, "calls with a memory differ"
