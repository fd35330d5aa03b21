"""The short causal convolution on a GPU: tiles of tokens and channels, each input read from cache once per tap.

A lag of l tokens counts where none of the last l tokens is a reset. The programs after those of the tiles move states:
the last inputs into the final one, or the gradient into the initial one.
"""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.common import piece, sigmoid
from altx_kernels.gpu.launching import DEVICE, cut, launch, power_of_2, rows
from altx_kernels.primitive import Primitive


@triton.jit
def bounds_of(n, cu, lengths, T, PACKED: tl.constexpr, LENGTHS: tl.constexpr):
    """The first token of sequence n, its end, and the end of what the final state has seen."""
    begin = n * T
    finish = begin + T
    if PACKED:
        begin = tl.load(cu + n)
        finish = tl.load(cu + n + 1)
    seen = finish
    if LENGTHS:
        seen = begin + tl.load(lengths + n)
    return begin, finish, seen


@triton.jit
def input_of(x, initial, s, c, n, begin, mask, sx, D, W: tl.constexpr, INITIAL: tl.constexpr):
    """Input s, which may lie before the first token."""
    at = s - begin
    value = tl.load(x + s * sx + c, mask & (at >= 0), 0.0).to(tl.float32)
    if INITIAL:
        before = mask & (at < 0) & (at >= 1 - W)
        value += tl.load(initial + (n * (W - 1) + at + W - 1) * D + c, before, 0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["T", "L", "P"])
def forward_kernel(
    x, weight, bias, initial, reset, cu, lengths, y, final, table, T, L, P, sx, D,
    W: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    if i < P:
        n, start, stop = piece(i, table, T, L, PACKED)
        begin, _finish, _seen = bounds_of(n, cu, lengths, T, PACKED, False)
        t = (start + tl.arange(0, BT))[:, None]
        mask = (t < stop) & (c < D)
        acc = tl.zeros([BT, BD], tl.float32)
        if bias is not None:
            acc += tl.load(bias + c, c < D, 0.0).to(tl.float32)
        alive = mask
        for lag in tl.static_range(W):
            w = tl.load(weight + c * W + (W - 1 - lag), c < D, 0.0).to(tl.float32)
            acc += w * input_of(x, initial, t - lag, c, n, begin, alive, sx, D, W, initial is not None)
            if reset is not None:
                alive = alive & (tl.load(reset + t - lag, (t < stop) & (t - lag >= begin), 0) == 0)
        if SILU:
            acc *= sigmoid(acc)
        tl.store(y + t * D + c, acc.to(y.dtype.element_ty), mask)
    else:
        n = i - P
        begin, _finish, seen = bounds_of(n, cu, lengths, T, PACKED, lengths is not None)
        j = tl.arange(0, BW)[:, None]
        s = seen - (W - 1) + j
        kept = (j < W - 1) & (c < D)
        if reset is not None:
            for lag in tl.static_range(1, W - 1):
                kept = kept & (tl.load(reset + s + lag, (s + lag < seen) & (s + lag >= begin), 0) == 0)
        value = input_of(x, initial, s, c, n, begin, kept, sx, D, W, initial is not None)
        tl.store(final + (n * (W - 1) + j) * D + c, value.to(final.dtype.element_ty), (j < W - 1) & (c < D))


@triton.jit(do_not_specialize=["T", "L"])
def weights_kernel(
    dy, x, weight, bias, initial, reset, cu, d_pre, d_weight, d_bias, table, T, L, sx, D,
    W: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Each tile's part of the gradients of weight and bias, and, behind silu, the gradient of what it was taken of."""
    i = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    n, start, stop = piece(i, table, T, L, PACKED)
    begin, _finish, _seen = bounds_of(n, cu, cu, T, PACKED, False)
    t = (start + tl.arange(0, BT))[:, None]
    mask = (t < stop) & (c < D)
    d = tl.load(dy + t * D + c, mask, 0.0).to(tl.float32)
    if SILU:
        acc = tl.zeros([BT, BD], tl.float32)
        if bias is not None:
            acc += tl.load(bias + c, c < D, 0.0).to(tl.float32)
        alive = mask
        for lag in tl.static_range(W):
            w = tl.load(weight + c * W + (W - 1 - lag), c < D, 0.0).to(tl.float32)
            acc += w * input_of(x, initial, t - lag, c, n, begin, alive, sx, D, W, initial is not None)
            if reset is not None:
                alive = alive & (tl.load(reset + t - lag, (t < stop) & (t - lag >= begin), 0) == 0)
        gate = sigmoid(acc)
        d *= gate * (1 + acc * (1 - gate))
        tl.store(d_pre + t * D + c, d, mask)
    alive = mask
    for lag in tl.static_range(W):
        value = input_of(x, initial, t - lag, c, n, begin, alive, sx, D, W, initial is not None)
        part = tl.sum(tl.where(mask, d * value, 0.0), 0)[None, :]
        tl.store(d_weight + (i * W + (W - 1 - lag)) * D + c, part, c < D)
        if reset is not None:
            alive = alive & (tl.load(reset + t - lag, (t < stop) & (t - lag >= begin), 0) == 0)
    tl.store(d_bias + i * D + c, tl.sum(d, 0)[None, :], c < D)


@triton.jit
def gradient_of(
    d_pre, weight, d_final, reset, s, c, n, begin, finish, seen, mask, D, W: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """The gradient of input s, which may lie before the first token: of every output and state it is in."""
    out = tl.zeros([BT, BD], tl.float32)
    alive = mask
    kept = mask
    for lag in tl.static_range(W):
        t = s + lag
        there = (t >= begin) & (t < finish)
        if lag > 0 and reset is not None:
            again = tl.load(reset + t, there, 0) != 0
            alive = alive & (again == 0)
            kept = kept & ((again == 0) | (t >= seen))
        w = tl.load(weight + c * W + (W - 1 - lag), c < D, 0.0).to(tl.float32)
        out += w * tl.load(d_pre + t * D + c, alive & there, 0.0).to(tl.float32)
    if W > 1:
        j = s - (seen - (W - 1))
        kept = kept & (j >= 0) & (j < W - 1)
        out += tl.load(d_final + (n * (W - 1) + j) * D + c, kept, 0.0).to(tl.float32)
    return out


@triton.jit(do_not_specialize=["T", "L", "P"])
def inputs_kernel(
    d_pre, weight, d_final, reset, cu, lengths, dx, d_initial, table, T, L, P, D,
    W: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    if i < P:
        n, start, stop = piece(i, table, T, L, PACKED)
        begin, finish, seen = bounds_of(n, cu, lengths, T, PACKED, lengths is not None)
        s = (start + tl.arange(0, BT))[:, None]
        mask = (s < stop) & (c < D)
        d = gradient_of(d_pre, weight, d_final, reset, s, c, n, begin, finish, seen, mask, D, W, BT, BD)
        tl.store(dx + s * D + c, d.to(dx.dtype.element_ty), mask)
    else:
        n = i - P
        begin, finish, seen = bounds_of(n, cu, lengths, T, PACKED, lengths is not None)
        j = tl.arange(0, BW)[:, None]
        before = begin - (W - 1) + j
        wanted = (j < W - 1) & (c < D)
        past = gradient_of(d_pre, weight, d_final, reset, before, c, n, begin, finish, seen, wanted, D, W, BW, BD)
        tl.store(d_initial + (n * (W - 1) + j) * D + c, past.to(d_initial.dtype.element_ty), wanted)


def config(tokens: int, dim: int, width: int) -> dict[str, int]:
    """A tile's sides: 32 tokens, so that few taps are read twice; 64 channels, 128 bytes of bfloat16."""
    return {"W": width, "BT": min(power_of_2(tokens, 1), 32), "BD": min(power_of_2(dim), 64), "num_warps": 4}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None, lengths: Tensor | None, activation: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, final = _forward_fake(x, weight, bias, initial_state, reset, cu_seqlens, lengths, activation)
    x = rows(x)
    weight = weight.contiguous()
    bias, initial_state, reset, lengths = _contiguous(bias, initial_state, reset, lengths)
    tile = config(x.shape[1], x.shape[2], weight.shape[1])
    pieces = cut(x, cu_seqlens, tile["BT"])
    cu = None if cu_seqlens is None else cu_seqlens.to(x.device, torch.int64).contiguous()
    launch(
        forward_kernel, (pieces.count + pieces.sequences, triton.cdiv(x.shape[2], tile["BD"])), x, weight, bias,
        initial_state, reset, cu, lengths, y, final, pieces.table, x.shape[1], pieces.length, pieces.count, x.stride(1),
        x.shape[2], SILU=activation, PACKED=cu is not None, **tile, BW=power_of_2(weight.shape[1] - 1, 1),
    )  # fmt: skip
    return y, final


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None, lengths: Tensor | None, activation: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = x.dtype if initial_state is None else initial_state.dtype
    return x.new_empty(x.shape), x.new_empty(N, weight.shape[1] - 1, x.shape[2], dtype=dtype)


def _backward(
    dy: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, d_initial = x.new_empty(x.shape), d_final.new_empty(d_final.shape)
    (B, T, D), W = x.shape, weight.shape[1]
    shapes = (weight, bias)
    x, dy, d_final = rows(x), dy.contiguous(), d_final.contiguous()
    weight = weight.contiguous()
    bias, initial_state, reset, lengths = _contiguous(bias, initial_state, reset, lengths)
    tile = config(T, D, W)
    pieces = cut(x, cu_seqlens, tile["BT"])
    cu = None if cu_seqlens is None else cu_seqlens.to(x.device, torch.int64).contiguous()
    blocks = triton.cdiv(D, tile["BD"])
    d_pre = x.new_empty(B, T, D, dtype=torch.float32) if activation else dy
    # Parts of tiles, summed up in a fixed order: the same gradient every time.
    d_weight = x.new_empty(pieces.count, W, D, dtype=torch.float32)
    d_bias = x.new_empty(pieces.count, D, dtype=torch.float32)
    launch(
        weights_kernel, (pieces.count, blocks), dy, x, weight, bias, initial_state, reset, cu, d_pre, d_weight, d_bias,
        pieces.table, T, pieces.length, x.stride(1), D, SILU=activation, PACKED=cu is not None, **tile,
    )  # fmt: skip
    launch(
        inputs_kernel, (pieces.count + pieces.sequences, blocks), d_pre, weight, d_final, reset, cu, lengths, dx,
        d_initial, pieces.table, T, pieces.length, pieces.count, D, PACKED=cu is not None, **tile,
        BW=power_of_2(W - 1, 1),
    )  # fmt: skip
    return (
        dx, d_weight.sum(0).T.to(shapes[0].dtype).contiguous(),
        d_bias.sum(0).to(dx.dtype if shapes[1] is None else shapes[1].dtype), d_initial,
    )  # fmt: skip


def _backward_fake(
    dy: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_bias = x.new_empty(x.shape[2], dtype=x.dtype if bias is None else bias.dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_bias, d_final.new_empty(d_final.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.activation = inputs[-1]


def _differentiate(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, d_weight, d_bias, d_initial = BACKWARD(dy, d_final, *saved, ctx.activation)
    return (
        dx,
        d_weight,
        *(None if x is None else d for x, d in zip(saved[2:4], (d_bias, d_initial), strict=True)),
        *([None] * 4),
    )


BACKWARD = Primitive("altx::causal_conv1d_triton_backward", _backward, _backward_fake, device=DEVICE)
FORWARD = Primitive(
    "altx::causal_conv1d_triton", _forward, _forward_fake, save=_save, backward=_differentiate, device=DEVICE
)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, initial_state: Tensor | None = None,
    reset: Tensor | None = None, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None,
    activation: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `altx_kernels.causal_conv1d.causal_conv1d`; no float64."""
    y, final = FORWARD(x, weight, bias, initial_state, reset, cu_seqlens, lengths, activation)
    return y, final
