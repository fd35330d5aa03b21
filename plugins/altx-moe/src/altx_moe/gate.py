"""What the routers share: the gate, the route of tokens that choose, and what is measured of a decision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import altx_moe.kernels.grouped_mm  # noqa: F401  # serves the products of a bank of experts
from altx.context import Context
from altx.router import Route, Targets


class Gate(nn.Module):
    """Logits (B, T, n) of tokens x (B, T, D), in at least float32, autocast or not.

    A masked token counts as 0, and a dead target's logit is the lowest number there is.
    """

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, targets: Targets, ctx: Context) -> Tensor:
        logits = precise_linear(real(x, ctx), self.weight)
        if targets.alive is not None:
            logits = logits.masked_fill(~targets.alive, torch.finfo(logits.dtype).min)
        return logits


def real(x: Tensor, ctx: Context) -> Tensor:
    """x (B, T, D) with 0 at masked tokens, whatever they hold."""
    return x if ctx.mask is None else torch.where(ctx.mask[..., None], x, 0)


def precise_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in at least float32, autocast or not."""
    precise = torch.promote_types(x.dtype, torch.float32)
    device = "cpu" if x.is_meta else x.device.type
    with torch.autocast(device, enabled=False):
        return F.linear(x.to(precise), weight.to(precise))


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


def balance(load: Tensor, probs: Tensor) -> Tensor:
    """The load-balance loss, over any number of choices: 1 when balanced. Fedus et al. 2021, equations 4 to 6.

    Args:
        load: (n,) tokens sent to each target.
        probs: (n,) mean probabilities.
    """
    return len(load) * (load / load.sum().clamp(min=1) * probs).sum()


def z(logits: Tensor, valid: Tensor) -> Tensor:
    """The z-loss. Zoph et al. 2022, equation 5."""
    return mean(torch.logsumexp(logits, -1).square(), valid)


def token_choice(
    target: Tensor,
    weight: Tensor,
    n: int,
    probs: Tensor,
    real: Tensor,
    losses: Mapping[str, Tensor] | None = None,
    wanted: Tensor | None = None,
) -> Route:
    """The route of tokens that choose.

    Args:
        target: (B, T, K) int64, -1 for none.
        weight: (B, T, K).
        n: number of targets.
        probs: (n,) mean probabilities.
        real: (B, T) bool.
        losses: the route's.
        wanted: number of pairs that would be there if none was dropped; default: as many as there are.
    """
    length = real.numel()
    token = torch.arange(length, device=real.device).repeat_interleave(target.shape[-1])
    measured = metrics(loads(target.flatten(), n), probs, (target >= 0).sum(-1), real, wanted)
    return Route(n, token, target.flatten(), weight.flatten(), losses or {}, measured)


def metrics(load: Tensor, probs: Tensor, used: Tensor, real: Tensor, wanted: Tensor | None = None) -> dict[str, Tensor]:
    """What to look at, over real tokens only.

    Args:
        load: (n,) tokens sent to each target.
        probs: (n,) mean probabilities.
        used: (B, T) number of targets of each token.
        real: (B, T) bool.
        wanted: as in `token_choice`.
    """
    probs = probs.detach()
    dropped = torch.zeros_like(load[0]) if wanted is None else 1 - load.sum() / wanted.clamp(min=1)
    return {
        "load": load,
        "max_load": load.max() / load.mean().clamp(min=1 / len(load)),
        "entropy": -torch.xlogy(probs, probs).sum(),
        "drop_rate": dropped if wanted is None else torch.where(wanted > 0, dropped, 0),
        "no_target": (real & (used == 0)).sum(),
    }
