"""What Mamba-3's recurrence is made of, in C for CPUs: turned keys, queries and inputs in one pass over the tokens.

Letters as in `recurrence`. Nothing is computed for the recurrence's sake alone: a goes into the queries and the
trapezoid's weights w_t = g_{t-1} + s_t into the keys, which are written where the next token finds them.

    angle_t = angle_{t-1} + dt_t turns_t    (mod 2 pi, summed in float64)
    q_t = a_t R(angle_t) (C_t + C_bias),    k_{t+1} = w_{t+1} R(angle_t) (B_t + B_bias),    v_{t+1} = x_t
    qk_t = (C_t + C_bias) . (B_t + B_bias)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.packing import bounds, token_rows
from altx_kernels.primitive import Primitive

LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {
        "angles": "p" * 7 + "i" * 4, "angles_backward": "p" * 9 + "i" * 4,
        "turn": "p" * 18 + "i" * 8, "turn_backward": "p" * 28 + "i" * 8,
    },
)  # fmt: skip

BLOCK = 32
"""Tokens of a block, as in native.c."""

SERIAL = 2**16
"""So many numbers of keys are done before a second thread has woken."""

Turned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""q and k (B, T, H, N), v (B, T, H, P) and qk (B, T, H); the turned key and the angle after the last token."""


def turn(
    x: Tensor,
    dt: Tensor,
    turns: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    a: Tensor,
    w: Tensor,
    initial_angle: Tensor | None,
    initial_k: Tensor,
    initial_v: Tensor,
    reset: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Turned:
    """The equations above, for tensors of one dtype; k and v are zero where a reset comes before their token.

    Args:
        x, dt, B, C, B_bias, C_bias, initial_angle, initial_k, initial_v, reset, lengths, cu_seqlens: as in
            `mamba3.mamba3`, zero at padding.
        turns: (B, T, R), by what a dt of 1 turns.
        a, w: (B, T, H).
    """
    inputs = (x, dt, turns, B, C, B_bias, C_bias, a, w, initial_angle, initial_k, initial_v)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    q, k, v, qk, last, angle, _ = _TURN(*inputs, reset, lengths, cu_seqlens, keep)
    return q, k, v, qk, last, angle


def _threads(x: Tensor, B: Tensor) -> int:
    return torch.get_num_threads() if x[..., 0].numel() * B.shape[3] > SERIAL else 1


def _inputs(
    x: Tensor, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, angle: Tensor, a: Tensor, w: Tensor,
    initial_k: Tensor, initial_v: Tensor, reset: Tensor | None, lengths: Tensor | None, cuts: Tensor,
) -> tuple[list[Tensor | None], list[int]]:  # fmt: skip
    """What `turn` and its backward take first, and last."""
    x, stride = token_rows(x)
    rest = (B, C, B_bias, C_bias, angle, a, w, initial_k, initial_v, reset, lengths)
    given = [x, *(None if value is None else value.contiguous() for value in rest), cuts]
    return given, [len(initial_k), x.shape[2], *B.shape[2:], x.shape[3], angle.shape[3], stride, _threads(x, B)]


def _forward(
    x: Tensor, dt: Tensor, turns: Tensor, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, a: Tensor, w: Tensor,
    initial_angle: Tensor | None, initial_k: Tensor, initial_v: Tensor, reset: Tensor | None, lengths: Tensor | None,
    cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    cuts = bounds(x, cu_seqlens)
    lengths = None if lengths is None else lengths.to(torch.int64)
    q, k, v, qk, last_k, last_angle, _ = _forward_fake(
        x, dt, turns, B, C, B_bias, C_bias, a, w, initial_angle, initial_k, initial_v, reset, lengths, cu_seqlens, keep
    )
    angle = x.new_empty(*dt.shape, turns.shape[2])
    given, sizes = _inputs(x, B, C, B_bias, C_bias, angle, a, w, initial_k, initial_v, reset, lengths, cuts)
    before = None if initial_angle is None else initial_angle.contiguous()
    LIBRARY.call(
        "angles", x.dtype, dt.contiguous(), turns.contiguous(), before, None if reset is None else reset.contiguous(),
        cuts, angle, last_angle, len(initial_k), *angle.shape[2:], sizes[-1],
    )  # fmt: skip
    LIBRARY.call("turn", x.dtype, *given, q, k, v, qk, last_k, *sizes)
    return q, k, v, qk, last_k, last_angle, angle if keep else x.new_empty(0)


def _forward_fake(
    x: Tensor, dt: Tensor, turns: Tensor, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, a: Tensor, w: Tensor,
    initial_angle: Tensor | None, initial_k: Tensor, initial_v: Tensor, reset: Tensor | None, lengths: Tensor | None,
    cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k = (x.new_empty(*x.shape[:3], B.shape[3]) for _ in range(2))
    last_angle = x.new_empty(*initial_k.shape[:2], turns.shape[2])
    angle = x.new_empty((*dt.shape, turns.shape[2]) if keep else 0)
    return q, k, x.new_empty(x.shape), x.new_empty(dt.shape), initial_k.new_empty(initial_k.shape), last_angle, angle


def _backward(
    x: Tensor, dt: Tensor, turns: Tensor, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, a: Tensor, w: Tensor,
    initial_k: Tensor, initial_v: Tensor, reset: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None,
    angle: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dqk: Tensor, dlast_k: Tensor | None, dlast_angle: Tensor | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    cuts = bounds(x, cu_seqlens)
    lengths = None if lengths is None else lengths.to(torch.int64)
    given, sizes = _inputs(x, B, C, B_bias, C_bias, angle, a, w, initial_k, initial_v, reset, lengths, cuts)
    dx, ddt, dturns, dB, dC, _, _, da, dw, dangle0, _, _ = _backward_fake(
        x, dt, turns, B, C, B_bias, C_bias, a, w, initial_k, initial_v, reset, lengths, cu_seqlens, angle, dq, dk, dv,
        dqk, dlast_k, dlast_angle,
    )  # fmt: skip
    dB_bias, dC_bias = x.new_empty(2, -(-x.shape[0] * x.shape[1] // BLOCK), *B_bias.shape)
    dk0, dv0, dangle = (x.new_zeros(t.shape) for t in (initial_k, initial_v, angle))
    gradients = [None if value is None else value.contiguous() for value in (dq, dk, dv, dqk, dlast_k, dlast_angle)]
    LIBRARY.call(
        "turn_backward", x.dtype, *given, *gradients[:5], dx, dB, dC, dB_bias, dC_bias, dangle, da, dw, dk0, dv0,
        *sizes,
    )  # fmt: skip
    LIBRARY.call(
        "angles_backward", x.dtype, dt.contiguous(), turns.contiguous(), given[10], cuts, dangle, gradients[5],
        ddt, dturns, dangle0, len(initial_k), *angle.shape[2:], sizes[-1],
    )  # fmt: skip
    return dx, ddt, dturns, dB, dC, dB_bias.sum(0), dC_bias.sum(0), da, dw, dangle0, dk0, dv0


def _backward_fake(
    x: Tensor, dt: Tensor, turns: Tensor, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, a: Tensor, w: Tensor,
    initial_k: Tensor, initial_v: Tensor, reset: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None,
    angle: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dqk: Tensor, dlast_k: Tensor | None, dlast_angle: Tensor | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    dx, ddt, dturns, dB, dC, dB_bias, dC_bias, da, dw, dk0, dv0 = (
        t.new_empty(t.shape) for t in (x, dt, turns, B, C, B_bias, C_bias, a, w, initial_k, initial_v)
    )
    dangle0 = x.new_empty(*initial_k.shape[:2], turns.shape[2])
    return dx, ddt, dturns, dB, dC, dB_bias, dC_bias, da, dw, dangle0, dk0, dv0


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_angle, initial_k, initial_v, reset, lengths, cu_seqlens, _ = inputs
    ctx.turned = initial_angle is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, initial_k, initial_v, reset, lengths, cu_seqlens, output[6])


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    x, B, angle = saved[0], saved[3], saved[-1]
    shapes = [(*x.shape[:3], B.shape[3])] * 2 + [x.shape, x.shape[:3]]
    dq, dk, dv, dqk = (
        x.new_zeros(shape) if gradient is None else gradient
        for shape, gradient in zip(shapes, gradients[:4], strict=True)
    )
    found = _TURN_BACKWARD(*saved[:-1], angle, dq, dk, dv, dqk, *gradients[4:6])
    *of_tokens, dangle0, dk0, dv0 = found
    return (*of_tokens, dangle0 if ctx.turned else None, dk0, dv0, None, None, None, None)


_TURN = Primitive("altx::mamba3_turn", _forward, _forward_fake, save=_save, backward=_differentiate, keep="keep")
_TURN_BACKWARD = Primitive("altx::mamba3_turn_backward", _backward, _backward_fake)
