"""Which bucket a vector falls into: angular locality-sensitive hashing (Andoni et al. 2015), section 2 of the paper.

B rows, T tokens, H heads, D head width, R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HELD = 1 << 22
"""Coordinates of rotated vectors held at a time."""


def rotations(
    heads: int, width: int, rounds: int, factors: Sequence[int], generator: torch.Generator, device: torch.device
) -> Tensor:
    """Random directions: (heads, D, R, sum of factors / 2), normal, float32, drawn where the generator lives."""
    shape = heads, width, rounds, sum(factors) // 2
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


@torch.no_grad()
def hashed(qk_BTHD: Tensor, rotations_HDRK: Tensor, factors: Sequence[int]) -> Tensor:
    """The bucket of every token in every round: (B, T, H, R) int64, below the product of the factors.

    h(q) = argmax([q R, -q R]); with several factors, one such number for each, the first the least significant.
    """
    dtype = torch.promote_types(qk_BTHD.dtype, torch.float32)
    table = rotations_HDRK.to(dtype).flatten(2).expand(qk_BTHD.shape[2], -1, -1)
    rounds = rotations_HDRK.shape[2]

    def buckets(x_BTHD: Tensor) -> Tensor:
        turned = torch.matmul(x_BTHD.to(dtype).transpose(1, 2), table).unflatten(-1, (rounds, -1))
        bucket, place = torch.zeros((), dtype=torch.int64, device=x_BTHD.device), 1
        for part, factor in zip(turned.split([n // 2 for n in factors], -1), factors, strict=True):
            bucket = bucket + place * torch.cat([part, -part], -1).argmax(-1)
            place *= factor
        return bucket.transpose(1, 2)

    if torch.compiler.is_compiling():
        return buckets(qk_BTHD)
    # With as many buckets as chunks, all rotated vectors of a long sequence together would not be linear in its length.
    step = max(HELD // (qk_BTHD[:, :1, :, 0].numel() * rounds * sum(factors)), 1)
    return torch.cat([buckets(x) for x in qk_BTHD.split(step, 1)], 1)
