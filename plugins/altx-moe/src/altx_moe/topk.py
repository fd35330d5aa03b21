"""Token choice: each token uses the k targets that score highest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.layer import FRESH, StepInfo
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import TopKConfig, topk_capabilities
from altx_moe.gate import Gate, loads, mean, metrics, routable


class TopK(Router):
    """Top-k routing (Shazeer et al. 2017, arXiv:1701.06538), dropless.

    With `bias_rate`, a bias joins the scores that pick the targets but not those that weigh them, and follows the
    load in `on_step` (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3, arXiv:2412.19437, equation 16).

    Args:
        config: k, scores and balancing.
        dim: model width D.
        n: number of targets.
    """

    bias: Tensor | None

    def __init__(self, config: TopKConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = topk_capabilities(config)
        self.gate = Gate(dim, n)
        self.register_buffer("bias", torch.zeros(n, dtype=torch.float32) if config.bias_rate else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.bias is not None:
            # In bfloat16 the bias would soon be too coarse for its steps.
            self.bias = self.bias.to(torch.float32)
        return self

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        batch, length, n = *x.shape[:2], targets.n
        logits = self.gate(x, targets, ctx)
        real, valid = routable(x, targets, ctx)
        scores = torch.softmax(logits, -1) if self.config.score == "softmax" else torch.sigmoid(logits)
        index = self._pick(scores.detach(), targets)
        target = torch.where(valid[..., None], index, -1)
        if targets.alive is not None:
            target = torch.where(targets.alive[index], target, -1)
        weight = torch.where(target < 0, 0, scores.gather(-1, index))
        if self.config.renormalise:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        load = loads(target.flatten(), n)
        probs = mean(scores / scores.sum(-1, keepdim=True), valid)
        losses = {
            # Fedus et al. 2021, equations 4 to 6, over k choices: 1 when balanced.
            "balance": n * (load / load.sum().clamp(min=1) * probs).sum(),
            # Zoph et al. 2022, equation 5.
            "z": mean(torch.logsumexp(logits, -1).square(), valid),
        }
        token = torch.arange(batch * length, device=x.device).repeat_interleave(self.config.k)
        return Route(
            n,
            token,
            target.flatten(),
            weight.flatten(),
            {name: losses[name] for name in self.capabilities.losses},
            metrics(load, probs, (target >= 0).sum(-1), real),
            state,
        )

    def _pick(self, scores: Tensor, targets: Targets) -> Tensor:
        """The k targets of each token: (B, T, k) int64."""
        if self.bias is not None:
            scores = scores + self.bias
        if targets.alive is not None:
            scores = scores.masked_fill(~targets.alive, -torch.inf)
        return scores.topk(self.config.k, -1).indices

    @torch.no_grad()
    def on_step(self, info: StepInfo) -> None:
        """Raise the bias of targets with less than the mean load, lower that of the others."""
        if self.bias is not None and "load" in info.metrics:
            load = info.metrics["load"].to(self.bias)
            self.bias += self.config.bias_rate * torch.sign(load.mean() - load)


def build(config: TopKConfig, ctx: BuildContext) -> Router:
    return TopK(config, ctx.dim, ctx.num_targets)
