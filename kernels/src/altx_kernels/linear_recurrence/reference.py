"""Linear recurrences as the papers write them: one token at a time, in any dtype. The oracle of every backend.

    code        SSD (arXiv:2405.21060)      GLA (arXiv:2312.06635)      shape
    q           C                           q                           (B, T, G, K)
    k           B                           k                           (B, T, G, K)
    v           X (times dt)                v                           (B, T, H, V)
    exp(g)      A, per head                 alpha, per key channel      (B, T, H) or (B, T, H, K)
    S           H, the state, transposed    S                           (B, H, K, V)

B rows, T tokens, H heads, G groups of heads with one q and k, K key channels, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.packing import one_by_one


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `altx_kernels.linear_recurrence.linear_recurrence`: GLA, equation 3; SSD, equation 1."""
    if cu_seqlens is not None:
        return one_by_one(
            linear_recurrence, cu_seqlens, {"q": q, "k": k, "v": v, "g": g, "reset": reset}, initial_state
        )
    dtype, out = precise(q, k, v, g, initial_state), v.dtype
    heads = v.shape[2] // q.shape[2]
    q, k = (x.to(dtype).repeat_interleave(heads, 2) for x in (q, k))
    v = v.to(dtype)
    S = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None:
        S = initial_state.to(dtype).clone()
    os = []
    for t in range(v.shape[1]):
        if g is not None:
            decay = torch.exp(g[:, t].to(dtype))
            S = S * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
        if reset is not None:
            S = torch.where(reset[:, t, None, None, None], 0, S)
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        os.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    o = torch.stack(os, 1) if os else v.clone()
    return o.to(out), S
