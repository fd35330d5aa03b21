"""One token of Mamba-3 (one input, one output per head): the whole mixer, written with plain operations on one token.

Paper: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles", arXiv:2603.15569.
Letters: B rows, M model width, E = H P inner width in H heads of width P, N state size, G groups of heads, R angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_kernels.arguments import precise
from altx_kernels.gated_rms_norm.reference import gated_rms_norm
from altx_mamba.kernels import one_token
from altx_mamba.kernels.mamba3.reference import TURN, Result, rotate


def mamba3_step(
    x: Tensor,
    h: Tensor,
    angle: Tensor,
    k: Tensor,
    v: Tensor,
    in_weight: Tensor,
    dt_bias: Tensor,
    B_weight: Tensor,
    C_weight: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor,
    *,
    norm_eps: float,
    A_floor: float,
    heavy_tail: bool = False,
    donate: bool = False,
    pre_weight: Tensor | None = None,
    pre_eps: float = 0.0,
    seen: Tensor | None = None,
) -> Result:
    """One token of every row; head i has the B and C of group i // (H // G).

        [z | u | B | C | dt | a | l | theta] = W_in x,  dt = softplus(dt + b_dt),  A = -max(softplus(a), A_floor)
        angle += dt pi tanh(theta)  (mod 2 pi),  key = R(angle) (norm(B) + b_B),  query = R(angle) (norm(C) + b_C)
        h = e^{dt A} h + (1 - sigmoid(l)) dt e^{dt A} k v^T + sigmoid(l) dt key u^T,  k = key,  v = u
        y = W_out ((h^T query + D u) * silu(z))

    Args:
        x: (B, 1, M), the token at model width.
        h: (B, H, N, P), the state before.
        angle: (B, H, R), the sum of turns before.
        k, v: (B, H, N) and (B, H, P), the key and the input u of the token before.
        in_weight: (2E + 2GN + 3H + R, M).
        dt_bias, D: (H,).
        B_weight, C_weight: (N,), of the RMSNorms on B and C.
        B_bias, C_bias: (H, N).
        norm_weight: (E,), of an RMSNorm of each head's output before the gate, or None for no norm.
        out_weight: (M, E).
        norm_eps: epsilon of all norms.
        A_floor: smallest -A.
        heavy_tail: whether -A is 1 + a for positive a and 1 / (1 - a) for others, instead of softplus(a).
        donate: the caller gives h, angle, k and v up: they may be written to.
        pre_weight: (M,), of an RMSNorm on x, after which x is added to the result: x + mixer(norm(x)).
        pre_eps: its epsilon.
        seen: (B,) int64, the tokens before; moved on by one, in place.

    Returns:
        y (B, 1, M) in the dtype of x; h, angle, k and v in float32, or float64 if an argument is: the dtype that all is
        computed in.
    """
    if seen is not None:
        seen += 1
    dtype = precise(x, h, angle, k, v, in_weight)
    x_, h, angle, k, v, W_in, b_dt, w_B, w_C, b_B, b_C, D, W_out = (
        tensor.to(dtype)
        for tensor in (x, h, angle, k, v, in_weight, dt_bias, B_weight, C_weight, B_bias, C_bias, D, out_weight)
    )
    x_ = one_token.normed(x_[:, 0], pre_weight, pre_eps)
    heads, size, width = h.shape[1:]
    inner, shared = heads * width, (len(W_in) - 2 * heads * width - 3 * heads - angle.shape[2]) // 2
    parts = F.linear(x_, W_in).split([inner, inner, shared, shared, heads, heads, heads, angle.shape[2]], -1)
    z, u, B, C, dt, a, trap, theta = parts
    B, C = (
        F.rms_norm(part.unflatten(-1, (shared // size, size)), (size,), w, norm_eps).repeat_interleave(
            heads * size // shared, 1
        )
        for part, w in ((B, w_B), (C, w_C))
    )
    dt = F.softplus(dt + b_dt)
    rate = a.clamp(min=0) + torch.reciprocal(1 - a.clamp(max=0)) if heavy_tail else F.softplus(a)
    decay, weight = torch.exp(-dt * rate.clamp(min=A_floor))[..., None, None], torch.sigmoid(trap)
    angle = torch.remainder(angle + dt[..., None] * math.pi * torch.tanh(theta)[:, None], TURN)
    key, query = rotate(B + b_B, angle), rotate(C + b_C, angle)
    h = decay * (h + (((1 - weight) * dt)[..., None] * k)[..., None] * v[:, :, None])
    v = u.unflatten(-1, (heads, width))
    h = h + ((weight * dt)[..., None] * key)[..., None] * v[:, :, None]
    y = ((query[:, :, None] @ h)[:, :, 0] + D[:, None] * v).flatten(1)
    if norm_weight is None:
        y = y * F.silu(z)
    else:
        y = gated_rms_norm(y, z, norm_weight.to(dtype), eps=norm_eps, group_size=width, gate_first=False)
    # A copy, since what u is a part of would stay in memory with it.
    return one_token.added(F.linear(y, W_out), x, pre_weight), h, angle, key, v.clone()
