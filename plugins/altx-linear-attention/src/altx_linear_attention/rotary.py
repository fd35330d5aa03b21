"""Rotation of queries and keys by their position (Su et al. 2021; Sun et al. 2022, xPos, arXiv:2212.10554)."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(device: torch.device) -> torch.dtype:
    """float64 where the device has it, for angles and counts that grow with the position."""
    return torch.float32 if device.type == "mps" else torch.float64


def turns(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, T, F) of position times frequency, as exact at the millionth token as at the first.

    Args:
        positions: (B, T) int64.
        frequencies: (F,).
        dtype: of the result.
    """
    angle = positions[..., None].to(frequencies.dtype) * frequencies
    angle = angle.remainder(2 * torch.pi).to(dtype)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the neighbours 2i and 2i + 1 of every head of x (B, T, H, 2 F), as a plane, by angle i."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
