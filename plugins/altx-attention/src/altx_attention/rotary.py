"""Rotary position embedding (Su et al. 2021), in the half-split layout of GPT-NeoX and Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Angle of each pair of features: position * theta^(-2i / head_dim), i < head_dim / 2.

    Su et al. 2021, equation 15. In float32, or float64 where `dtype` is.

    Returns:
        (B, T, head_dim / 2).
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=positions_BT.device).to(dtype) / head_dim
    return positions_BT[..., None].to(dtype) * theta**-exponent


def rotate(x_BTHD: Tensor, angles_BTE: Tensor) -> Tensor:
    """Turn feature i and feature i + D/2 of every head, as a plane, by angle i; equation 34 in the half-split order."""
    cos, sin = angles_BTE.cos()[:, :, None], angles_BTE.sin()[:, :, None]
    a, b = x_BTHD.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BTHD.dtype)
