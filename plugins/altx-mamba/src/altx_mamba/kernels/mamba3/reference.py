"""Mamba-3's recurrence (one input, one output per head) as the paper writes it: one token at a time, in any dtype.

Paper: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles", arXiv:2603.15569.
Two things are new beside Mamba-2. The state is discretised by a trapezoid, which weighs the inputs at both ends of a
step. And it rotates: a complex decay, which in real numbers is a rotation of B and C by an angle that adds up over the
tokens.

    code            paper                                       shape
    x               x, the input of each head                   (B, T, H, P)
    dt              Delta, after softplus                       (B, T, H)
    A               A_t, negative, computed from the token      (B, T, H)
    B, C            B, C, normed, shared by H/G heads           (B, T, G, N)
    trap            lambda, before the sigmoid                  (B, T, H)
    angles          theta, before pi tanh                       (B, T, R)
    B_bias, C_bias  one per head, added to B and C              (H, N)
    D               D, the skip                                 (H,)
    h               h, the state                                (B, H, N, P)
    angle           the sum of dt theta                         (B, H, R)
    k               B + B_bias of the last token, rotated       (B, H, N)
    v               x of the last token                         (B, H, P)

B rows, T tokens, H heads of width P, G groups, N state size, R <= N/2 angles; angle r rotates rows 2r and 2r + 1.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from altx_kernels.arguments import precise

TURN = 2 * math.pi

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""y, and the states h, angle, k and v."""


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    initial_angle: Tensor | None = None,
    initial_k: Tensor | None = None,
    initial_v: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """The trapezoid rule on a rotating state, head by head.

        angle_t = angle_{t-1} + dt_t pi tanh(angles_t)    (mod 2 pi)
        k_t = R(angle_t) (B_t + B_bias),    q_t = R(angle_t) (C_t + C_bias)
        a_t = exp(dt_t A_t),    l_t = sigmoid(trap_t)
        h_t = a_t h_{t-1} + (1 - l_t) dt_t a_t k_{t-1} x_{t-1}^T + l_t dt_t k_t x_t^T
        y_t = h_t^T q_t + D x_t

    Args:
        x, dt, A, B, C, trap, angles, B_bias, C_bias, D: as above.
        initial_state, initial_angle, initial_k, initial_v: h, angle, k and v before the first token; zero if None.
        reset: (B, T) bool; where it is true, h, angle, k and v before the token count as zero.
        lengths: (B,) int64; the tokens of a row after so many are padding: they count as zeros and change no state.
        cu_seqlens: (S+1,) int64; x has one row of S sequences end to end, and states are (S, ...).

    Returns:
        y (B, T, H, P) in the dtype of x; h, angle, k and v after the last token, in float32 or more.
    """
    if cu_seqlens is not None:
        per_token = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "trap": trap, "angles": angles, "reset": reset}
        states = {
            "initial_state": initial_state, "initial_angle": initial_angle,
            "initial_k": initial_k, "initial_v": initial_v,
        }  # fmt: skip
        return _one_by_one(cu_seqlens, per_token, states, B_bias=B_bias, C_bias=C_bias, D=D)
    dtype, heads = precise(x, dt, A, B, C, trap, angles, B_bias, C_bias, D, initial_state), x.shape[2]
    u, dt, A, B, C, trap, angles = (tensor.to(dtype) for tensor in (x, dt, A, B, C, trap, angles))
    if lengths is not None:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        u, dt, A, B, trap, angles = blank(padding, u, dt, A, B, trap, angles)
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], 2) for tensor in (B, C))
    shapes = ((*B.shape[3:], x.shape[3]), angles.shape[2:], B.shape[3:], x.shape[3:])
    h, angle, k, v = (
        u.new_zeros(len(x), heads, *shape) if state is None else state.to(dtype)
        for state, shape in zip((initial_state, initial_angle, initial_k, initial_v), shapes, strict=True)
    )
    ys = []
    for t in range(x.shape[1]):
        before = h, angle, k, v
        if reset is not None:
            h, angle, k, v = (torch.where(_rows(reset[:, t], state), 0, state) for state in before)
        angle = torch.remainder(angle + dt[:, t, :, None] * math.pi * torch.tanh(angles[:, t, None]), TURN)
        key, query = (rotate(part[:, t] + bias.to(dtype), angle) for part, bias in ((B, B_bias), (C, C_bias)))
        decay, weight = torch.exp(dt[:, t] * A[:, t])[..., None, None], torch.sigmoid(trap[:, t])
        earlier = ((1 - weight) * dt[:, t])[..., None] * k
        h = decay * (h + earlier[..., None] * v[:, :, None])
        k, v = key, u[:, t]
        h = h + ((weight * dt[:, t])[..., None] * k)[..., None] * v[:, :, None]
        ys.append((query[..., None] * h).sum(2))
        if lengths is not None:
            k, v = (
                torch.where(_rows(padding[:, t], new), old, new) for old, new in zip(before[2:], (k, v), strict=True)
            )
    y = torch.stack(ys, 1) if ys else u
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    return y.to(x.dtype), h, angle, k, v


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the pairs (x_0, x_1), (x_2, x_3), ... of x (..., N) by angle (..., R); the rest stays as it is."""
    turning = 2 * angle.shape[-1]
    even, odd = x[..., 0:turning:2], x[..., 1:turning:2]
    cos, sin = torch.cos(angle), torch.sin(angle)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., turning:]], -1)


def blank(padding: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (B, T, ...) with zeros at the tokens where padding (B, T) is true."""
    return tuple(t.masked_fill(padding.reshape(*padding.shape, *[1] * (t.dim() - 2)), 0) for t in tensors)


def _one_by_one(
    cu_seqlens: Tensor, per_token: dict[str, Tensor | None], states: dict[str, Tensor | None], **rest: Tensor | None
) -> Result:
    """A packed batch, one sequence after the other."""
    cuts = cu_seqlens.tolist()
    found = []
    for n, (start, stop) in enumerate(pairwise(cuts)):
        tokens = {name: None if value is None else value[:, start:stop] for name, value in per_token.items()}
        before = {name: None if state is None else state[n : n + 1] for name, state in states.items()}
        found.append(mamba3(**tokens, **before, **rest))  # type: ignore[arg-type]
    y, h, angle, k, v = zip(*found, strict=True)
    return torch.cat(y, 1), torch.cat(h), torch.cat(angle), torch.cat(k), torch.cat(v)


def _rows(rows: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, ...), to go with `like`."""
    return rows.reshape(-1, *[1] * (like.dim() - 1))
