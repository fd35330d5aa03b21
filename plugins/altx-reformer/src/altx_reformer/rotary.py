"""Rotary position embedding (Su et al. 2021), in the interleaved layout of the paper and of reformer-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BTHD: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Turn features 2i and 2i + 1 of every head, as a plane, by position * theta^(-2i / D); equation 34."""
    dtype = torch.promote_types(x_BTHD.dtype, torch.float32)
    width = x_BTHD.shape[-1]
    exponent = torch.arange(0, width, 2, device=x_BTHD.device).to(dtype) / width
    angle = (positions_BT[..., None].to(dtype) * theta**-exponent)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x_BTHD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x_BTHD.dtype)
