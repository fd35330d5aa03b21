"""The angles of rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def turns(positions_BT: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles that features are turned by: position * theta^(-2i / width), i < width / 2.

    Su et al. 2021, equation 15. In float32, or float64 where `dtype` is.

    Returns:
        Two of (B, T, width / 2).
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, width, 2, device=positions_BT.device).to(dtype) / width
    angle = positions_BT[..., None].to(dtype) * theta**-exponent
    return angle.cos(), angle.sin()
