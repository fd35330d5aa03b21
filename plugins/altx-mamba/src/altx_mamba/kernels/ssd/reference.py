"""Mamba-2's state-space recurrence as the paper writes it: one token at a time, in any dtype.

Paper: Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality", arXiv:2405.21060.

    code            paper                        shape
    x               X, the input of each head    (B, T, H, P)
    dt              Delta, after softplus        (B, T, H)
    A               A, one negative number       (H,)
    B, C            B, C, shared by H/G heads    (B, T, G, N)
    D               D, the skip                  (H,)
    h               h, the state                 (B, H, N, P)

B rows, T tokens, H heads of width P, G groups, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.packing import one_by_one


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2 with A = a I and B discretised by its first order (section 7), head by head.

        h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T,    y_t = C_t h_t + D x_t

    Head h uses the B and C of group h // (H // G). A token with dt = 0 leaves the state exactly as it was.

    Args:
        x, dt, A, B, C, D: as above.
        initial_state: (B, H, N, P), h before the first token; zero if None.
        reset: (B, T) bool; where it is true, h_{t-1} counts as zero.
        cu_seqlens: (S+1,) int64; x has one row of S sequences end to end, and states are (S, H, N, P).

    Returns:
        y (B, T, H, P) in the dtype of x, and the last h (B, H, N, P) in float32 or more.
    """
    if cu_seqlens is not None:
        per_token = {"x": x, "dt": dt, "B": B, "C": C, "reset": reset}
        return one_by_one(ssd, cu_seqlens, per_token, initial_state, A=A, D=D)
    dtype = precise(x, dt, A, B, C, D, initial_state)
    heads = x.shape[2]
    u, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], 2) for tensor in (B, C))
    shape = (len(x), heads, B.shape[3], x.shape[3])
    h = u.new_zeros(shape) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None, None], 0, h)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + B[:, t, :, :, None] * (dt[:, t, :, None] * u[:, t])[:, :, None]
        ys.append((C[:, t, :, :, None] * h).sum(2))
    y = torch.stack(ys, 1) if ys else u
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    return y.to(x.dtype), h
