"""What both routers share: the gate, and what is measured of a decision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.router import Targets


class Gate(nn.Module):
    """Logits (B, T, n) of tokens x (B, T, D), in at least float32, autocast or not.

    A masked token counts as 0, and a dead target's logit is the lowest number there is.
    """

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, targets: Targets, ctx: Context) -> Tensor:
        if ctx.mask is not None:
            x = torch.where(ctx.mask[..., None], x, 0)
        precise = torch.promote_types(x.dtype, torch.float32)
        device = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device, enabled=False):
            logits = F.linear(x.to(precise), self.weight.to(precise))
        if targets.alive is not None:
            logits = logits.masked_fill(~targets.alive, torch.finfo(precise).min)
        return logits


def routable(x: Tensor, targets: Targets, ctx: Context) -> tuple[Tensor, Tensor]:
    """The real tokens, and those of them that can have a target: none where none lives. Both (B, T) bool."""
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if ctx.mask is None else ctx.mask
    return real, real if targets.alive is None else real & targets.alive.any()


def mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values (B, T, ...) over the valid (B, T) tokens; 0 if there are none."""
    valid = valid.reshape(*valid.shape, *[1] * (values.dim() - 2))
    return torch.where(valid, values, 0).sum((0, 1)) / valid.sum().clamp(min=1)


def loads(target: Tensor, n: int) -> Tensor:
    """(n,) how many pairs have each target; target (P,) int64, -1 for none."""
    counts = torch.zeros(n + 1, device=target.device)
    slots = torch.where(target < 0, n, target)
    return counts.index_add(0, slots, torch.ones_like(slots, dtype=counts.dtype))[:n]


def metrics(load: Tensor, probs: Tensor, used: Tensor, real: Tensor) -> dict[str, Tensor]:
    """What to look at.

    Args:
        load: (n,) tokens sent to each target.
        probs: (n,) mean probabilities.
        used: (B, T) number of targets of each token.
        real: (B, T) bool.
    """
    probs = probs.detach()
    return {
        "load": load,
        "max_load": load.max() / load.mean().clamp(min=1 / len(load)),
        "entropy": -torch.xlogy(probs, probs).sum(),
        "dropped": (real & (used == 0)).sum(),
    }
