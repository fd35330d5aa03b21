"""Laws of a bare memory."""

from __future__ import annotations

import torch

from altx.memory import Memory
from altx.testing.case import Case, agitate, difference, state_difference
from altx.testing.check import EXACT, Finding, law


def _if_memory(case: Case) -> str | None:
    return None if case.subject.memory else "is not a memory"


@law("scan equals the loop of reads and writes", applies=_if_memory)
def scan(case: Case) -> Finding | None:
    assert case.subject.memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        memory = case.subject.memory().double()
    agitate(memory)
    x = torch.randn(2, 9, case.subject.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
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
        if fast.read.value is not None and plain.read.value is not None:
            real = mask if ctx.mask is not None else torch.ones_like(mask)
            worst = max(worst, difference(fast.read.value[real], plain.read.value[real]))
    return worst, EXACT, "scan differs from the loop of reads and writes"
