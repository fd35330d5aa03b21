"""One token of Mamba-2: the whole mixer, written with plain operations on one token.

Paper: Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality", arXiv:2405.21060, figure 6 (right). Letters: B rows, M model width, E = H P inner width in H heads of width P,
N state size, G groups of heads, K taps, S = E + 2 G N channels of the convolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_kernels.arguments import precise
from altx_kernels.gated_rms_norm.reference import gated_rms_norm
from altx_mamba.kernels import one_token


def mamba2_step(
    x: Tensor,
    past: Tensor,
    h: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    norm_eps: float,
    dt_limit: tuple[float, float | None] = (0.0, None),
    donate: bool = False,
    pre_weight: Tensor | None = None,
    pre_eps: float = 0.0,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every row; head i has the B and C of group i // (H // G).

        [z | u | dt] = W_in x,  [v | B | C] = silu(conv(u)),  dt = softplus(dt + b_dt)
        h = exp(dt A) h + B (dt v)^T,  y = W_out norm((C h + D v) * silu(z))

    Args:
        x: (B, 1, M), the token at model width.
        past: (B, K-1, S), the u of the tokens before.
        h: (B, H, N, P), the state before.
        in_weight: (E + S + H, M). in_bias: (E + S + H,).
        conv_weight: (S, 1, K). conv_bias: (S,).
        dt_bias, A_log, D: (H,); A_log is the log of -A.
        norm_weight: (E,), of the RMSNorm over each group's channels.
        out_weight: (M, E). out_bias: (M,).
        norm_eps: epsilon of the norm.
        dt_limit: what step sizes are clamped to; an upper None is no limit.
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
    x_, past_, h, W_in, W_conv, b_dt, A_log, D, W_out = (
        tensor.to(dtype) for tensor in (x, past, h, in_weight, conv_weight, dt_bias, A_log, D, out_weight)
    )
    x_ = one_token.normed(x_[:, 0], pre_weight, pre_eps)
    b_in, b_conv, b_out = (bias if bias is None else bias.to(dtype) for bias in (in_bias, conv_bias, out_bias))
    heads, size, width = h.shape[1:]
    inner, channels = heads * width, past.shape[2]
    groups = (channels - inner) // (2 * size)
    z, u, dt = F.linear(x_, W_in, b_in).split([inner, channels, heads], -1)
    window = torch.cat([past_, u[:, None]], 1)
    u = (window * W_conv[:, 0].mT).sum(1)
    u = F.silu(u if b_conv is None else u + b_conv)
    v, B, C = u.split([inner, groups * size, groups * size], -1)
    v = v.unflatten(-1, (heads, width))
    B, C = (part.unflatten(-1, (groups, size)).repeat_interleave(heads // groups, 1) for part in (B, C))
    least, most = dt_limit
    dt = F.softplus(dt + b_dt).clamp(least, math.inf if most is None else most)
    h = torch.exp(dt * -torch.exp(A_log))[..., None, None] * h + B[..., None] * (dt[..., None] * v)[:, :, None]
    y = (C[:, :, None] @ h)[:, :, 0] + D[:, None] * v
    y = gated_rms_norm(y.flatten(1), z, norm_weight, eps=norm_eps, group_size=inner // groups, gate_first=True)
    return one_token.added(F.linear(y, W_out, b_out), x, pre_weight), window[:, 1:].to(past.dtype, copy=True), h
