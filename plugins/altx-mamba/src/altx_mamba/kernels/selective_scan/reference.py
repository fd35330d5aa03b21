"""The selective scan as the paper writes it: one token at a time, in any dtype. The oracle of every backend.

Paper: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752.

    code            paper                           shape
    x               x, the SSM's input              (B, T, D)
    dt, dt_bias     Delta, before tau = softplus    (B, T, D), (D,)
    A               A, negative                     (D, N)
    B, C            B, C                            (B, T, N)
    D               D, the skip                     (D,)
    z               the other branch of figure 3    (B, T, D)
    h               h, the state                    (B, D, N)

B rows, T tokens, D channels, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_kernels.arguments import precise
from altx_kernels.packing import one_by_one


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    softplus: bool = False,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `selective_scan.selective_scan`: Algorithm 2, line 6, with equation 2.

    As in the authors' code, A is discretised by zero-order hold (equation 4) and B by its first order, dt B.
    """
    if cu_seqlens is not None:
        per_token = {"x": x, "dt": dt, "B": B, "C": C, "z": z, "reset": reset}
        return one_by_one(
            selective_scan, cu_seqlens, per_token, initial_state, A=A, D=D, dt_bias=dt_bias, softplus=softplus
        )
    dtype, out = precise(x, dt, A, B, C, D, z, dt_bias, initial_state), x.dtype
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype).clone()
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], 0, h)
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None, :] * x[:, t, :, None]
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out), h
