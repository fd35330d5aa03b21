"""Rotation as Su et al. 2021 write it, plane by plane."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import precise


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, first: int = 0, interleave: bool = False) -> Tensor:
    """Equation 15 for every plane; see `altx_attention.kernels.rotary.rotary`."""
    dtype, count = precise(x, cos, sin), cos.shape[-1]
    cos, sin = cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]
    turned = x[..., first : first + 2 * count].to(dtype)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleave else turned.chunk(2, -1)
    planes = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(planes, -1).flatten(-2) if interleave else torch.cat(planes, -1)
    if 2 * count == x.shape[-1]:
        return turned.to(x.dtype)
    return torch.cat([x[..., :first], turned.to(x.dtype), x[..., first + 2 * count :]], -1)
