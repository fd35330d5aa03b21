"""How the authors' code starts parameters: by where the block stands in the model, and the channel in the block.

r = layer / (layers - 1), from 0 to 1,      f = 1 - layer / layers, from 1 to almost 0
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from altx.spec import BuildContext


class Depth(NamedTuple):
    """Where a block stands.

    Args:
        rising: r, 0 in the first block and 1 in the last.
        falling: f, 1 in the first block and almost 0 in the last.
        share: of the blocks, how many there are with this one.
    """

    rising: float
    falling: float
    share: float


def depth(ctx: BuildContext) -> Depth:
    n = ctx.num_layers
    return Depth(ctx.layer / max(n - 1, 1), 1 - ctx.layer / n, (ctx.layer + 1) / n)


def channels(size: int) -> Tensor:
    """0, 1 / size, 2 / size, ...: (size,)."""
    return torch.arange(size) / size


def ramp(size: int) -> Tensor:
    """From 0 to 1, both included: (size,)."""
    return torch.arange(size) / max(size - 1, 1)


def zigzag(size: int) -> Tensor:
    """0, 1, -1, 0, ...: (size,)."""
    return (torch.arange(size) + 1) % 3 - 1.0


def decay_speed(size: int, start: float, by: float, exponent: float) -> Tensor:
    """start + by ramp^exponent: (size,)."""
    return start + by * ramp(size) ** exponent


def per_channel(values: Tensor) -> nn.Parameter:
    """A parameter (1, 1, D), as checkpoints have it; a copy, since others may start from the same values."""
    return nn.Parameter(values.reshape(1, 1, -1).clone())


def bonus(size: int, place: Depth) -> Tensor:
    """What the current token's key is multiplied by in RWKV-5 and RWKV-6: (size,)."""
    return place.rising * (1 - ramp(size)) + 0.1 * zigzag(size)


def head_norm(heads: int, dim: int, eps: float, scale: float) -> nn.GroupNorm:
    """The norm of each head's output, whose weights start lower in earlier blocks."""
    norm = nn.GroupNorm(heads, dim, eps=eps)
    nn.init.constant_(norm.weight, scale**0.7)
    return norm


@torch.no_grad()
def orthogonal(weight: Tensor, scale: float = 1.0) -> None:
    """Orthogonal, rows or columns, and larger where there are more rows than columns."""
    rows, columns = weight.shape
    nn.init.orthogonal_(weight, gain=scale * max(sqrt(rows / columns), 1.0))
