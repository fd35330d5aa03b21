"""Token choice: each token uses the k targets that score highest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH, StepInfo
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import TopKConfig, topk_capabilities
from altx_moe.gate import Gate, balance, loads, mean, precise_linear, real, routable, token_choice, z

DEAD = -100.0
"""What a dead target counts for in the score of its group: far less than any other, and exact enough to add to."""


class TopK(Router):
    """Top-k routing (Shazeer et al. 2017, arXiv:1701.06538), dropless.

    With `bias_rate`, a bias joins the scores that pick the targets but not those that weigh them, and follows the
    load in `on_step` (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3, arXiv:2412.19437, equation 16).
    With `groups`, a token's targets lie in the `groups_used` groups that score highest: by their best target
    (DeepSeek-V2, arXiv:2405.04434, section 2.2.2), with a bias by the sum of their best two (DeepSeek-V3).
    With `noise`, logits while training are those of Shazeer et al. 2017, equation 4.

    Args:
        config: k, scores and balancing.
        dim: model width D.
        n: number of targets, the shared ones first.
    """

    bias: Tensor | None

    def __init__(self, config: TopKConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = topk_capabilities(config)
        routed = n - config.shared
        self.gate = Gate(dim, routed)
        self.noise = nn.Parameter(torch.zeros(routed, dim)) if config.noise else None
        self.register_buffer("bias", torch.zeros(routed, dtype=torch.float32) if config.bias_rate else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            # In bfloat16 the bias would soon be too coarse for its steps.
            self.bias = self.bias.to(torch.float32)
        return self

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        config, alive = self.config, targets.alive
        routed = replace(targets, n=targets.n - config.shared, alive=None if alive is None else alive[config.shared :])
        logits = self.gate(x, routed, ctx)
        if self.noise is not None and self.training:
            size = F.softplus(precise_linear(real(x, ctx), self.noise))
            noise = torch.randn(size.shape, generator=ctx.generator, device=x.device, dtype=size.dtype)
            logits = logits + noise * size
        present, valid = routable(x, routed, ctx)
        scores = torch.softmax(logits, -1) if config.score == "softmax" else torch.sigmoid(logits)
        value, index = self._pick(scores.detach(), routed)
        target = torch.where(valid[..., None] & (value > -torch.inf), index, -1)
        weight = torch.where(target < 0, 0, scores.gather(-1, index))
        if config.renormalise:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        load = loads(target.flatten(), routed.n)
        probs = mean(scores / scores.sum(-1, keepdim=True), valid)
        losses = {}
        if config.balance_weight:
            losses["balance"] = balance(load, probs)
        if config.z_weight:
            losses["z"] = z(logits, valid)
        target, weight = self._with_shared(target, weight * config.scale, present, targets)
        route = token_choice(target, weight, targets.n, probs, present, losses)
        # What is balanced, and looked at, is what was chosen.
        measured = {**route.metrics, "max_load": load.max() / load.mean().clamp(min=1 / len(load))}
        return replace(route, metrics=measured, state=state)

    def _pick(self, scores: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Biased scores and indices of the k targets of each token, both (B, T, k); -inf is none."""
        if self.bias is not None:
            scores = scores + self.bias
        if targets.alive is not None:
            scores = scores.masked_fill(~targets.alive, -torch.inf)
        if self.config.groups > 1:
            grouped = scores.unflatten(-1, (self.config.groups, -1))
            best = min(2, grouped.shape[-1]) if self.bias is not None else 1
            # One dead target must not rule out its group.
            sums = grouped.clamp(min=DEAD).topk(best, -1).values.sum(-1)
            group = sums.topk(self.config.groups_used, -1).indices
            used = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, group, True)
            scores = grouped.masked_fill(~used[..., None], -torch.inf).flatten(-2)
        picked = scores.topk(self.config.k, -1)
        return picked.values, picked.indices

    def _with_shared(self, target: Tensor, weight: Tensor, present: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Target and weight (B, T, K) with the shared targets in front."""
        shared = self.config.shared
        if not shared:
            return target, weight
        served = present[..., None].expand(-1, -1, shared)
        if targets.alive is not None:
            served = served & targets.alive[:shared]
        always = torch.where(served, torch.arange(shared, device=target.device), -1)
        target = torch.cat([always, torch.where(target < 0, -1, target + shared)], -1)
        return target, torch.cat([served.to(weight.dtype), weight], -1)

    @torch.no_grad()
    def on_step(self, info: StepInfo) -> None:
        """Raise the bias of targets with less than the mean load, lower that of the others."""
        if self.bias is not None and "load" in info.metrics:
            load = info.metrics["load"].to(self.bias)[self.config.shared :]
            self.bias += self.config.bias_rate * torch.sign(load.mean() - load)


def build(config: TopKConfig, ctx: BuildContext) -> Router:
    return TopK(config, ctx.dim, ctx.num_targets)
