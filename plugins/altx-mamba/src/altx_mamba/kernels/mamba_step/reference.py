"""One token of Mamba-1: the whole mixer, written with plain operations on one token.

Paper: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752,
Algorithm 2 and figure 3. Letters: B rows, M model width, E inner width, N state size, K taps, R rank of the step size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_kernels.arguments import precise
from altx_mamba.kernels import one_token


def mamba_step(
    x: Tensor,
    past: Tensor,
    h: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    inner_norm_eps: float | None = None,
    donate: bool = False,
    pre_weight: Tensor | None = None,
    pre_eps: float = 0.0,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every row.

        [u | z] = W_in x,  v = silu(conv(u)),  [low | B | C] = W_x v,  dt = softplus(W_dt low + b_dt)
        h = exp(dt A) h + dt B v,  y = W_out ((C h + D v) * silu(z))

    Args:
        x: (B, 1, M), the token at model width.
        past: (B, K-1, E), the u of the tokens before.
        h: (B, E, N), the state before.
        in_weight: (2E, M). in_bias: (2E,).
        conv_weight: (E, 1, K). conv_bias: (E,).
        x_weight: (R + 2N, E). dt_weight: (E, R). dt_bias: (E,).
        A_log: (E, N), log of -A. D: (E,).
        out_weight: (M, E). out_bias: (M,).
        inner_norm_eps: epsilon of a weightless RMSNorm on low, B and C, or None for no norm.
        donate: the caller gives `past` and `h` up: they may be written to.
        pre_weight: (M,), of an RMSNorm on x, after which x is added to the result: x + mixer(norm(x)).
        pre_eps: its epsilon.
        seen: (B,) int64, the tokens before; moved on by one, in place.

    Returns:
        y (B, 1, M) and `past` in the dtypes they came in, and `h` in float32, or float64 if an argument is: the dtype
        that all is computed in.
    """
    if seen is not None:
        seen += 1
    dtype = precise(x, past, h, in_weight)
    x_, past_, h, W_in, W_conv, W_x, W_dt, b_dt, A_log, D, W_out = (
        tensor.to(dtype)
        for tensor in (x, past, h, in_weight, conv_weight, x_weight, dt_weight, dt_bias, A_log, D, out_weight)
    )
    x_ = one_token.normed(x_[:, 0], pre_weight, pre_eps)
    b_in, b_conv, b_out = (bias if bias is None else bias.to(dtype) for bias in (in_bias, conv_bias, out_bias))
    u, z = F.linear(x_, W_in, b_in).chunk(2, -1)
    window = torch.cat([past_, u[:, None]], 1)
    v = (window * W_conv[:, 0].mT).sum(1)
    v = F.silu(v if b_conv is None else v + b_conv)
    low, B, C = F.linear(v, W_x).split([W_dt.shape[1], A_log.shape[1], A_log.shape[1]], -1)
    if inner_norm_eps is not None:
        low, B, C = (F.rms_norm(part, part.shape[-1:], eps=inner_norm_eps) for part in (low, B, C))
    dt = F.softplus(F.linear(low, W_dt, b_dt))
    h = torch.exp(dt[..., None] * -torch.exp(A_log)) * h + (dt * v)[..., None] * B[:, None]
    y = ((h @ C[..., None])[..., 0] + D * v) * F.silu(z)
    return one_token.added(F.linear(y, W_out, b_out), x, pre_weight), window[:, 1:].to(past.dtype, copy=True), h
