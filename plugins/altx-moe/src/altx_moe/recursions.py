"""How often a shared stack of layers is applied to each token: mixture of recursions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.errors import CompositionError
from altx.layer import FRESH, StepInfo
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

    For `capacity_warmup_steps` w, in training, a depth of capacity c has c + (1 - c) (1 + cos(pi step / w)) / 2 after
    so many optimizer steps (calls in the authors' code, which alone has this).

    Args:
        config: capacities, scores and predictor.
        dim: model width D.
        n: number of depths.
    """

    step: Tensor | None

    def __init__(self, config: RecursionsConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = recursions_capabilities(config)
        self.capacity = config.capacities(n)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64) if config.capacity_warmup_steps else None)
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
        share = self._share(depth)
        predicted = open_ & (guess > 0)
        causal = ctx.causal and not self.training
        if not isinstance(share, Tensor) and share == 1:
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

    def _share(self, depth: int) -> float | Tensor:
        """Of the tokens that are left before a depth, the share that it uses."""
        capacity, before = self.capacity[depth], self.capacity[depth - 1] if depth else 1.0
        if self.step is None or not self.training:
            return capacity / before
        done = (self.step.double() / self.config.capacity_warmup_steps).clamp(max=1)
        rest = (1 + torch.cos(torch.pi * done)) / 2
        return (capacity + (1 - capacity) * rest) / (before + (1 - before) * rest)

    @torch.no_grad()
    def on_step(self, info: StepInfo) -> None:
        if self.step is not None:
            self.step.fill_(info.step)


class TokenChoice(TopK):
    """Mixture of recursions by token choice (section 2.2.1, equation 2.3): a depth is a target like any other.

    For `balance_warmup_steps` optimizer steps, in training, every token goes to the last depth, weighted as always, and
    the bias stays 0 (calls in the authors' code, which alone has this).

    Args:
        config: scores and balancing.
        dim: model width D.
        n: number of depths.

    Raises:
        CompositionError: in a warm-up, if the targets are no depths.
    """

    step: Tensor | None

    def __init__(self, config: RecursionsConfig, dim: int, n: int) -> None:
        super().__init__(config.by_token, dim, n)
        self.warmup = config.balance_warmup_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.int64) if self.warmup else None)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        if self.warmup and targets.kind != "depths":
            raise CompositionError(
                f"balance_warmup_steps sends every token to the last depth, and these targets are {targets.kind}",
                hint="leave it out, or give depths",
            )
        return super().route(x, targets, ctx, state)

    def _pick(self, scores: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        if self.step is not None and self.training:
            deepest = torch.arange(targets.n, device=scores.device).to(scores).expand_as(scores)
            scores = torch.where(self.step < self.warmup, deepest, scores)
        return super()._pick(scores, targets)

    @torch.no_grad()
    def on_step(self, info: StepInfo) -> None:
        if self.step is not None:
            self.step.fill_(info.step)
        if info.step > self.warmup:  # Before, what the metrics tell is of the warm-up.
            super().on_step(info)


def build(config: RecursionsConfig, ctx: BuildContext) -> Router:
    if config.choice == "token":
        return TokenChoice(config, ctx.dim, ctx.num_targets)
    return Recursions(config, ctx.dim, ctx.num_targets)
