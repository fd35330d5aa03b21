"""Rotation of queries and keys by their position (Su et al. 2021; Sun et al. 2022, xPos, arXiv:2212.10554)."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(device: torch.device) -> torch.dtype:
    """float64 where the device has it, for angles and counts that grow with the position."""
    return torch.float32 if device.type == "mps" else torch.float64


def turns(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(i position frequency), complex (B, T, F), as exact at the millionth token as at the first.

    Args:
        positions: (B, T) int64.
        frequencies: (F,).
        dtype: of its parts.
    """
    angle = positions[..., None].to(frequencies.dtype) * frequencies
    angle = angle.remainder(2 * torch.pi).to(dtype)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbours 2i and 2i + 1 of every head of x (B, T, H, 2 F), as a complex number, times turn (B, T, 1 or H, F).

    Computed in the dtype of the turns, in one pass.
    """
    pairs = torch.view_as_complex(x.to(turn.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
