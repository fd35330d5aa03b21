"""The delta rule in its general form, a matrix decay of diagonal plus rank one, one token at a time: the oracle.

    S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T,    o_t = q_t S_t

Peng et al. 2025, "RWKV-7 'Goose' with Expressive Dynamic State Evolution", arXiv:2503.14456, equation 3, transposed
so that keys index the rows of S. `b` reads the state as it was before the decay. What the papers write, in it:

    DeltaNet        S_t = (I - beta k k^T) S_{t-1} + beta k v^T
    2406.06484      a = -beta k, b = k, g = None, k v^T from k and beta v

    Gated DeltaNet  S_t = alpha (I - beta k k^T) S_{t-1} + beta k v^T
    2412.06464      a = -beta k, b = alpha k, g = log alpha of (B, T, H), beta v for v

    KDA             S_t = (I - beta k k^T) diag(alpha) S_{t-1} + beta k v^T
    2510.26692      a = -beta k, b = alpha k, g = log alpha of (B, T, H, K), beta v for v

    RWKV-7          S_t = S_{t-1} (diag(w) - kappa^T (iclr * kappa)) + v^T k, its S being V x K and vectors rows
    2503.14456      a = -iclr * kappa, b = kappa, g = log w of (B, T, H, K); q is its receptance r

B rows, T tokens, H heads, K key channels, V value channels, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.packing import one_by_one


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None = None,
    *, initial_state: Tensor | None = None, reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The generalised delta rule (above), in float32 or more.

    Args:
        q, k, a, b: (B, T, H, K).
        v: (B, T, H, V).
        g: log decay <= 0, (B, T, H) for a whole head or (B, T, H, K) for each key channel; -inf forgets; None is 0.
        initial_state: (B, H, K, V), S before the first token; zeros if None. (N, H, K, V) with cu_seqlens.
        reset: (B, T) bool; where it is true, S_{t-1} counts as zero.
        cu_seqlens: (N+1,), bounds of N sequences end to end in one row.

    Returns:
        o (B, T, H, V) in the dtype of v, and the last S, in float32 or more.
    """
    if cu_seqlens is not None:
        per_token = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g, "reset": reset}
        return one_by_one(delta_rule, cu_seqlens, per_token, initial_state)
    dtype = precise(q, k, v, a, b, g, initial_state)
    batch, length, heads, width = q.shape
    S = q.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    if initial_state is not None:
        S = S + initial_state.to(dtype)
    o = []
    for t in range(length):
        q_t, k_t, v_t, a_t, b_t = (x[:, t].to(dtype) for x in (q, k, v, a, b))
        if reset is not None:
            S = torch.where(reset[:, t, None, None, None], 0, S)
        read = torch.einsum("bhk,bhkv->bhv", b_t, S)
        if g is not None:
            decay = torch.exp(g[:, t].to(dtype))
            S = (decay[..., None] if g.dim() == 4 else decay[..., None, None]) * S
        S = S + a_t[..., None] * read[:, :, None] + k_t[..., None] * v_t[:, :, None]
        o.append(torch.einsum("bhk,bhkv->bhv", q_t, S))
    return torch.stack(o, 1).to(v.dtype) if o else torch.zeros_like(v), S
