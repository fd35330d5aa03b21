"""Target choice of a few tokens, which a stream can predict: mixture of depths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import DepthsConfig, depths_capabilities
from altx_moe.gate import Gate, loads, mean, metrics, real, routable


class Depths(Router):
    """Mixture of depths (Raposo et al. 2024, arXiv:2404.02258, section 3, equation 1).

    While training, and in an encoder, each target uses the share of a row's tokens that score highest for it, and
    the others pass it by. In a causal model after training a predictor says which tokens those would be: the gate
    itself, whose logit then is above 0, or with predictor mlp a small network beside it, whose loss trains nothing
    else (section 3.5). The gate needs a bias for that, which the paper's equation 1 does not have: 0 would lie in
    the middle of its logits, not where the chosen begin.

    Args:
        config: share and predictor.
        dim: model width D.
        n: number of targets, 1 in the paper.
    """

    def __init__(self, config: DepthsConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = depths_capabilities(config)
        self.gate = Gate(dim, n)
        self.predictor: nn.Module | None = None
        self.bias = nn.Parameter(torch.zeros(n)) if config.predictor == "gate" else None
        if config.predictor == "mlp":
            hidden = max(1, dim // 4)
            self.predictor = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, n))

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        batch, length, n = *x.shape[:2], targets.n
        logits = self.gate(x, targets, ctx)  # (B, T, n)
        if self.bias is not None:
            logits = logits + self.bias
        present, valid = routable(x, targets, ctx)
        open_ = valid[..., None].expand(-1, -1, n)
        if targets.alive is not None:
            open_ = open_ & targets.alive
        guess = logits if self.predictor is None else self.predictor(real(x, ctx).detach()).to(logits.dtype)
        predicted = open_ & (guess > 0)
        causal = ctx.causal and not self.training
        used = predicted if causal else open_ & highest(logits.detach(), open_, self.config.capacity)
        weight = torch.sigmoid(logits) if self.config.score == "sigmoid" else logits
        weight = torch.where(used, weight, 0)
        token = torch.arange(batch * length, device=x.device).repeat_interleave(n)
        target = torch.where(used, torch.arange(n, device=x.device), -1).flatten()
        probs = mean(torch.softmax(logits, -1), valid)
        measured = metrics(loads(target, n), probs, used.sum(-1), present)
        losses = {}
        if not causal:
            error = F.binary_cross_entropy_with_logits(guess, used.to(guess), reduction="none")
            count = open_.sum().clamp(min=1)
            losses["predictor"] = torch.where(open_, error, 0).sum() / count
            measured["predicted"] = (open_ & (predicted == used)).sum() / count
        else:
            losses["predictor"] = guess.new_zeros(())
        return Route(n, token, target, weight.flatten(), losses, measured)


def highest(logits: Tensor, open_: Tensor, share: float | Tensor) -> Tensor:
    """(B, T, n) bool: the tokens of each row that score highest, a share of the open ones, rounded up.

    Args:
        logits: (B, T, n).
        open_: (B, T, n) bool, tokens that may be used.
        share: at most 1.
    """
    order = logits.masked_fill(~open_, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)[:, None]
    # A share such as 2 / 3 of 3 is 2, whatever the last digits say.
    most = torch.ceil(share * open_.sum(1, keepdim=True).double() - 1e-9)
    return torch.zeros_like(open_).scatter(1, order, rank < most)


def build(config: DepthsConfig, ctx: BuildContext) -> Router:
    return Depths(config, ctx.dim, ctx.num_targets)
