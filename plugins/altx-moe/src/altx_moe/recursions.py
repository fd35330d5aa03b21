"""How often a shared stack of layers is applied to each token: mixture of recursions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import RecursionsConfig, recursions_capabilities
from altx_moe.depths import highest
from altx_moe.gate import loads, mean, precise_linear, real, routable, z
from altx_moe.topk import TopK


class Recursions(Router):
    """Mixture of recursions by expert choice (Bae et al. 2025, arXiv:2507.10524, section 2.2.1).

    Every depth has a gate of its own, which scores the tokens that the depth before has used. While training, and in
    an encoder, those that score highest go on; in a causal model after training those that a predictor says would:
    the gate itself, whose logit then is above 0 (the paper's auxiliary loss), or with predictor mlp a small network
    that trains nothing else (its auxiliary router). At a depth whose capacity leaves out nobody nobody is asked.

    Args:
        config: shares, scores and predictor.
        dim: model width D.
        n: number of depths.
    """

    def __init__(self, config: RecursionsConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = recursions_capabilities(config)
        self.shares = config.shares(n)
        self.weight = nn.Parameter(torch.empty(n, dim))
        nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(n)) if config.predictor == "gate" else None
        hidden = max(1, dim // 4)
        self.predictors = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for _ in range(0 if config.predictor == "gate" else n)
        )

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        """Which of the tokens left, all others masked, use the target `targets.depth`."""
        batch, length, n, depth = *x.shape[:2], targets.n, targets.depth
        logits = precise_linear(real(x, ctx), self.weight[depth : depth + 1])  # (B, T, 1)
        if self.bias is not None:
            logits = logits + self.bias[depth]
        present, open_ = (each[..., None] for each in routable(x, targets, ctx))
        if targets.alive is not None:
            open_ = open_ & targets.alive[depth]
        guess = self.predictors[depth](real(x, ctx).detach()).to(logits.dtype) if self.predictors else logits
        share = self.shares[depth]
        predicted = open_ & (guess > 0)
        causal = ctx.causal and not self.training
        if share == 1:
            used = open_
        else:
            used = predicted if causal else highest(logits.detach(), open_, share)
        score = torch.tanh(logits) if self.config.score == "tanh" else torch.sigmoid(logits)
        weight = torch.where(used, score * self.config.factor, 0)
        token = torch.arange(batch * length, device=x.device)
        target = torch.where(used, depth, -1).flatten()
        # Who leaves later has had a target.
        measured = {"load": loads(target, n), "no_target": (present & ~used).sum() * (depth == 0)}
        error = F.binary_cross_entropy_with_logits(guess, used.to(guess), reduction="none")
        losses = {"predictor": guess.new_zeros(()) if causal else mean(error, open_[..., 0]).squeeze()}
        if self.config.z_weight:
            losses["z"] = z(logits, open_[..., 0])
        if not causal:
            # Summed over the depths, the mean of their shares.
            measured["predicted"] = (open_ & (predicted == used)).sum() / open_.sum().clamp(min=1) / n
        return Route(n, token, target, weight.flatten(), losses, measured)


def build(config: RecursionsConfig, ctx: BuildContext) -> Router:
    if config.choice == "token":
        # By token choice a depth is a target like any other (the paper's equation 2.3).
        return TopK(config.by_token, ctx.dim, ctx.num_targets)
    return Recursions(config, ctx.dim, ctx.num_targets)
