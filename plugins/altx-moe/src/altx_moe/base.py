"""Token choice by a balanced assignment: BASE layers."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import FRESH
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import BaseConfig, batch_capabilities
from altx_moe.gate import Gate, mean, routable, token_choice


class Base(Router):
    """BASE layers (Lewis et al. 2021, arXiv:2103.16716, sections 2 and 3).

    While training, the tokens of a batch are assigned to the targets so that their scores add up to as much as they
    can when no target gets more than tokens / n of them, rounded up. Otherwise each uses its best. The weight is
    sigmoid of the logit.

    Args:
        config: of the assignment.
        dim: model width D.
        n: number of targets.
    """

    def __init__(self, config: BaseConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = batch_capabilities(config)
        self.gate = Gate(dim, n)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        logits = self.gate(x, targets, ctx)
        present, valid = routable(x, targets, ctx)
        target = torch.where(valid, logits.argmax(-1), -1)
        if self.training:
            living = torch.arange(targets.n, device=x.device)
            living = living if targets.alive is None else living[targets.alive]
            scores = logits.detach()[valid][:, living]
            if scores.numel():
                target[valid] = living[assign(scores, self.config.precision, self.config.rounds)]
        target = target[..., None]
        weight = torch.where(target < 0, 0, torch.sigmoid(logits.gather(-1, target.clamp(min=0))))
        return token_choice(target, weight, targets.n, mean(torch.softmax(logits, -1), valid), present)


def assign(scores: Tensor, precision: float, rounds: int) -> Tensor:
    """One of n targets for each of P tokens, none for more than P / n, rounded up: (P,) int64.

    The auction algorithm (Bertsekas 1988) for places of n kinds. Waits for the device in every round.

    Args:
        scores: (P, n), P and n at least 1.
        precision: how far a token's score, less the price of its target, may be from the best it could have, of the
            spread of scores.
        rounds: at most.
    """
    tokens, n = scores.shape
    places = -(-tokens // n)
    if n == 1:
        return scores.new_zeros(tokens, dtype=torch.int64)
    step = float((scores.max() - scores.min()) * precision) or 1.0
    target = torch.full((tokens,), -1, dtype=torch.int64, device=scores.device)
    bid = torch.zeros(tokens, dtype=scores.dtype, device=scores.device)
    price = scores.new_zeros(n)
    for _ in range(rounds):
        free = (target < 0).nonzero().flatten()
        if not len(free):
            break
        best = (scores[free] - price).topk(2, -1)
        target[free] = best.indices[:, 0]
        bid[free] = price[best.indices[:, 0]] + best.values[:, 0] - best.values[:, 1] + step
        for i in best.indices[:, 0].unique().tolist():
            holders = (target == i).nonzero().flatten()
            if len(holders) >= places:
                order = bid[holders].argsort(descending=True, stable=True)
                target[holders[order[places:]]] = -1
                # The cheapest place: what a new bid has to beat.
                price[i] = bid[holders[order[places - 1]]]
    left = (target < 0).nonzero().flatten()
    if len(left):
        room = (places - torch.bincount(target[target >= 0], minlength=n)).clamp(min=0)
        target[left] = torch.arange(n, device=scores.device).repeat_interleave(room)[: len(left)]
    return target


def build(config: BaseConfig, ctx: BuildContext) -> Router:
    return Base(config, ctx.dim, ctx.num_targets)
