"""Token choice of one target with a limited number of tokens: the Switch Transformer's router."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import FRESH
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import SwitchConfig, switch_capabilities
from altx_moe.gate import Gate, balance, loads, mean, routable, token_choice, z


class Switch(Router):
    """Switch routing (Fedus et al. 2021, arXiv:2101.03961, section 2.2).

    While training a target takes the first capacity_factor L / n of the tokens that choose it in a row of L real
    tokens, rounded up (equation 3), and the rest has no target. Otherwise it takes all: a token's route then
    depends on itself alone, in a stream too.

    Args:
        config: capacity and losses.
        dim: model width D.
        n: number of targets.
    """

    def __init__(self, config: SwitchConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = switch_capabilities(config)
        self.gate = Gate(dim, n)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        n, jitter = targets.n, self.config.jitter
        if jitter and self.training:
            factor = torch.rand(x.shape, generator=ctx.generator, device=x.device, dtype=x.dtype)
            x = x * (1 - jitter + 2 * jitter * factor)
        logits = self.gate(x, targets, ctx)
        present, valid = routable(x, targets, ctx)
        scores = torch.softmax(logits, -1)
        best = scores.max(-1, keepdim=True)
        target = torch.where(valid[..., None], best.indices, -1)
        probs = mean(scores, valid)
        losses = {}
        # Fractions and losses are of what the tokens chose, dropped or not.
        if self.config.balance_weight:
            losses["balance"] = balance(loads(target.flatten(), n), probs)
        if self.config.z_weight:
            losses["z"] = z(logits, valid)
        if self.training and self.config.capacity_factor is not None:
            place = (target == torch.arange(n, device=x.device)).cumsum(1)  # (B, T, n), from 1
            place = place.gather(-1, target.clamp(min=0))
            capacity = torch.ceil(self.config.capacity_factor * valid.sum(1).double() / n)
            target = torch.where(place > capacity[:, None, None], -1, target)
        weight = torch.where(target < 0, 0, best.values)
        return token_choice(target, weight, n, probs, present, losses, wanted=valid.sum())


def build(config: SwitchConfig, ctx: BuildContext) -> Router:
    return Switch(config, ctx.dim, ctx.num_targets)
