"""Token choice of balanced scores: Sinkhorn."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import FRESH
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import SinkhornConfig, batch_capabilities
from altx_moe.gate import Gate, mean, routable, token_choice


class Sinkhorn(Router):
    """Sinkhorn routing (Clark et al. 2022, arXiv:2202.01169, section 3.2, as in Megatron-LM).

    While training, tokens pick from the logits of their batch after they were scaled so that all targets are equally
    popular; otherwise from the logits as they are. The weights are always of the logits as they are.

    Args:
        config: k and iterations.
        dim: model width D.
        n: number of targets.
    """

    def __init__(self, config: SinkhornConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = batch_capabilities(config)
        self.gate = Gate(dim, n)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        logits = self.gate(x, targets, ctx)
        present, valid = routable(x, targets, ctx)
        picking = logits.detach()
        if self.training:
            picking = balanced(picking, valid, targets.alive, self.config.iterations)
        if targets.alive is not None:
            picking = picking.masked_fill(~targets.alive, -torch.inf)
        picked = picking.topk(self.config.k, -1)
        target = torch.where(valid[..., None] & (picked.values > -torch.inf), picked.indices, -1)
        scores = torch.sigmoid(logits) if self.config.k == 1 else torch.softmax(logits, -1)
        weight = torch.where(target < 0, 0, scores.gather(-1, picked.indices))
        return token_choice(target, weight, targets.n, mean(torch.softmax(logits, -1), valid), present)


def balanced(logits: Tensor, valid: Tensor, alive: Tensor | None, iterations: int) -> Tensor:
    """Logits scaled so that exp of them adds up to 1 / tokens for each token and to 1 / targets for each target.

    Args:
        logits: (B, T, n).
        valid: (B, T) bool; other tokens get logits too, and change nobody's.
        alive: (n,) bool or None.
        iterations: of the Sinkhorn algorithm.
    """
    low = torch.finfo(logits.dtype).min / 4  # Low enough to count as nothing, and no infinity to subtract.
    rows = logits if alive is None else torch.where(alive, logits, low)
    column = logits.new_zeros(logits.shape[-1])
    tokens = valid.sum().clamp(min=1).log().to(logits)
    places = (alive.sum().clamp(min=1) if alive is not None else torch.tensor(len(column))).log().to(logits)
    row = logits.new_zeros(logits.shape[:2])
    for _ in range(iterations):
        row = -tokens - torch.logsumexp(rows + column, -1)
        shares = torch.where(valid[..., None], rows + row[..., None], low).flatten(0, 1)
        column = -places - torch.logsumexp(shares, 0) if len(shares) else column
        if alive is not None:
            column = torch.where(alive, column, 0)
    return rows + row[..., None] + column


def build(config: SinkhornConfig, ctx: BuildContext) -> Router:
    return Sinkhorn(config, ctx.dim, ctx.num_targets)
