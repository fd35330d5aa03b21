"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions_BT: Tensor, width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Angle of each pair of features: position * theta^(-2i / width), i < width / 2.

    Su et al. 2021, equation 15. In float32, or float64 where `dtype` is.

    Returns:
        (B, T, width / 2).
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, width, 2, device=positions_BT.device).to(dtype) / width
    return positions_BT[..., None].to(dtype) * theta**-exponent


def rotate(x_BTHD: Tensor, angles_BTE: Tensor) -> Tensor:
    """Turn the first 2 E features of every head by E angles; the others stay.

    Features i and i + E are a plane, as in GPT-NeoX and Llama; equation 34 in that order.
    """
    cos, sin = angles_BTE.cos()[:, :, None], angles_BTE.sin()[:, :, None]
    width = angles_BTE.shape[-1]
    a, b, *rest = x_BTHD.split([width, width, *[x_BTHD.shape[-1] - 2 * width] * (x_BTHD.shape[-1] > 2 * width)], -1)
    return torch.cat([(a * cos - b * sin).to(x_BTHD.dtype), (b * cos + a * sin).to(x_BTHD.dtype), *rest], -1)


def neighbours_apart(x: Tensor) -> Tensor:
    """(..., E): features 0, 2, 4, ... and then 1, 3, 5, ..., so that neighbours are turned together by `rotate`."""
    pairs: Tensor = x.unflatten(-1, (-1, 2))
    return pairs.transpose(-1, -2).flatten(-2)
