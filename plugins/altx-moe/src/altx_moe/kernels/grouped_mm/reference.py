"""Grouped products as a loop over targets."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import precise


def grouped_mm(x: Tensor, other: Tensor, offsets: Tensor) -> Tensor:
    """y_p = x_p other_i for p in offsets[i]:offsets[i+1], else 0; or x_i^T other_i of these rows for each i.

    Args:
        x: (P, D).
        other: (n, D, F), or (P, F).
        offsets: (n+1,) int64, rising from 0 to at most P.

    Returns:
        (P, F), or (n, D, F).
    """
    dtype, x, other = x.dtype, x.to(precise(x)), other.to(precise(x))
    rows = [slice(start, stop) for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    if other.dim() == 2:
        parts = [x[own].T @ other[own] for own in rows]
        return (torch.stack(parts) if parts else x.new_zeros(0, x.shape[1], other.shape[1])).to(dtype)
    parts = [x[own] @ weight for own, weight in zip(rows, other, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - int(offsets[-1]), other.shape[2])]).to(dtype)
