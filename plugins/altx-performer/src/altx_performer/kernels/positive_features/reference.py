"""Positive features token by token, in any dtype: the oracle of every backend.

    code          arXiv:2009.14794            shape
    a, b          w_i q, w_i k                (B, T, H, F)
    half          |k|^2 / 2                   (B, T, H)

B rows, T tokens, H heads, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import precise

LOWEST = -1e30
"""M before the first key: finite, so that no difference is NaN."""

GONE = -1000.0
"""The strongest decay, whose exponential is 0 in every dtype."""


def positive_features(
    a: Tensor, b: Tensor, half: Tensor, *, M: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `altx_performer.kernels.positive_features.positive_features`."""
    dtype = precise(a, b, half, M)
    rows, _, heads, count = a.shape
    m = a.new_full((rows, heads, count), LOWEST, dtype=dtype) if M is None else M.detach().to(dtype).clone()
    qs, ks, decays = [], [], []
    for t in range(a.shape[1]):
        e = b[:, t].to(dtype) - half[:, t, :, None].to(dtype)
        before = m if reset is None else torch.where(reset[:, t, None, None], LOWEST, m)
        m = torch.maximum(before, e.detach())
        decays.append((before - m).clamp(min=GONE))
        ks.append(torch.exp(e - m))
        x = a[:, t].to(dtype) + m
        qs.append(torch.exp(x - x.detach().amax(-1, keepdim=True)))
    if not qs:
        return torch.zeros_like(a), torch.zeros_like(b), a.new_zeros(a.shape, dtype=dtype), m
    return torch.stack(qs, 1).to(a.dtype), torch.stack(ks, 1).to(a.dtype), torch.stack(decays, 1), m
