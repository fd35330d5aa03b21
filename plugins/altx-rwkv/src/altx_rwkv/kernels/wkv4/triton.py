"""WKV of RWKV-4 on a GPU: a program walks through one sequence with a block of channels in registers."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.common import piece, sigmoid, softplus
from altx_kernels.gpu.launching import DEVICE, cut, launch, rows
from altx_kernels.primitive import Primitive
from altx_rwkv.kernels.wkv4.reference import EMPTY

NOTHING = tl.constexpr(EMPTY)
BLOCK = 32
"""Channels of a program: one warp, so that few sequences still occupy the GPU."""


@triton.jit
def tokens_of(i, table, lengths, T, L, PACKED: tl.constexpr):
    """The first token of sequence i, counted over all rows, and where its padding begins."""
    n, start, stop = piece(i, table, T, L, PACKED)
    if lengths is not None:
        stop = tl.minimum(stop, start + tl.maximum(tl.load(lengths + n), 0))
    return start, stop


@triton.jit(do_not_specialize=["T", "L"])
def forward_kernel(
    w, u, k, v, begin, reset, lengths, y, end, kept, table, T, L, sk, sv, D, PACKED: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_d = d < D
    start, stop = tokens_of(i, table, lengths, T, L, PACKED)
    decay = tl.load(w + d, in_d, 0.0).to(tl.float32)
    bonus = tl.load(u + d, in_d, 0.0).to(tl.float32)
    mean = tl.zeros([BD], tl.float32)
    weight = tl.full([BD], NOTHING, tl.float32)
    if begin is not None:
        mean = tl.load(begin + 2 * i * D + d, in_d, 0.0).to(tl.float32)
        weight = tl.load(begin + (2 * i + 1) * D + d, in_d, 0.0).to(tl.float32)
    for step in tl.range(0, (stop - start).to(tl.int32), num_stages=3):
        t = start + step
        kt = tl.load(k + t * sk + d, in_d, 0.0).to(tl.float32)
        vt = tl.load(v + t * sv + d, in_d, 0.0).to(tl.float32)
        if reset is not None:
            again = tl.load(reset + t) != 0
            mean = tl.where(again, 0.0, mean)
            weight = tl.where(again, NOTHING, weight)
        if kept is not None:
            tl.store(kept + 2 * t * D + d, mean, in_d)
            tl.store(kept + (2 * t + 1) * D + d, weight, in_d)
        change = vt - mean
        yt = mean + sigmoid(kt + bonus - weight) * change
        tl.store(y + t * D + d, yt.to(y.dtype.element_ty), in_d)
        decayed = weight + decay
        ahead = kt - decayed
        mean += sigmoid(ahead) * change
        weight = tl.where(ahead > 0, kt, decayed) + softplus(-tl.abs(ahead))
    tl.store(end + 2 * i * D + d, mean, in_d)
    tl.store(end + (2 * i + 1) * D + d, weight, in_d)


@triton.jit(do_not_specialize=["T", "L"])
def backward_kernel(
    dy, d_end, w, u, k, v, reset, lengths, kept, dw, du, dk, dv, d_begin, table, T, L, sk, sv, D,
    PACKED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_d = d < D
    start, stop = tokens_of(i, table, lengths, T, L, PACKED)
    decay = tl.load(w + d, in_d, 0.0).to(tl.float32)
    bonus = tl.load(u + d, in_d, 0.0).to(tl.float32)
    of_w = tl.zeros([BD], tl.float32)
    of_u = tl.zeros([BD], tl.float32)
    d_mean = tl.load(d_end + 2 * i * D + d, in_d, 0.0).to(tl.float32)
    d_weight = tl.load(d_end + (2 * i + 1) * D + d, in_d, 0.0).to(tl.float32)
    for step in tl.range(0, (stop - start).to(tl.int32), num_stages=3):
        t = stop - 1 - step
        kt = tl.load(k + t * sk + d, in_d, 0.0).to(tl.float32)
        vt = tl.load(v + t * sv + d, in_d, 0.0).to(tl.float32)
        mean = tl.load(kept + 2 * t * D + d, in_d, 0.0)
        weight = tl.load(kept + (2 * t + 1) * D + d, in_d, 0.0)
        dyt = tl.load(dy + t * D + d, in_d, 0.0).to(tl.float32)
        change = vt - mean
        now = sigmoid(kt + bonus - weight)
        after = sigmoid(kt - weight - decay)
        of_now = dyt * change * now * (1 - now)
        of_after = d_mean * change * after * (1 - after)
        past = d_weight * (1 - after) - of_after
        tl.store(dk + t * D + d, (of_now + of_after + d_weight * after).to(dk.dtype.element_ty), in_d)
        tl.store(dv + t * D + d, (dyt * now + d_mean * after).to(dv.dtype.element_ty), in_d)
        of_u += of_now
        of_w += past
        d_mean = dyt * (1 - now) + d_mean * (1 - after)
        d_weight = past - of_now
        if reset is not None:
            again = tl.load(reset + t) != 0
            d_mean = tl.where(again, 0.0, d_mean)
            d_weight = tl.where(again, 0.0, d_weight)
    tl.store(dw + i * D + d, of_w, in_d)
    tl.store(du + i * D + d, of_u, in_d)
    tl.store(d_begin + 2 * i * D + d, d_mean, in_d)
    tl.store(d_begin + (2 * i + 1) * D + d, d_weight, in_d)


def _start(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """k and v as rows, the grid, and what each kernel takes last."""
    k, v = rows(k), rows(v)
    pieces = cut(k, cu_seqlens, None)
    width = k.shape[2]
    last = (pieces.table, pieces.tokens, pieces.length, k.stride(1), v.stride(1), width)
    options = {"PACKED": cu_seqlens is not None, "BD": BLOCK, "num_warps": 1}
    return k, v, (pieces.count, triton.cdiv(width, BLOCK)), last, options


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    lengths: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, end, kept = _forward_fake(w, u, k, v, initial_state, reset, lengths, cu_seqlens, keep)
    if lengths is not None:
        y.zero_()
    if not k.numel():
        if initial_state is None:
            end[:, 0], end[:, 1] = 0, EMPTY
        else:
            end.copy_(initial_state)
        return y, end, kept
    k, v, grid, last, options = _start(k, v, cu_seqlens)
    launch(
        forward_kernel, grid, *_contiguous(w, u), k, v, *_contiguous(initial_state, reset, lengths), y, end,
        kept if keep else None, *last, **options,
    )  # fmt: skip
    return y, end, kept


def _forward_fake(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    lengths: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens = k.shape[0] * k.shape[1] if keep else 0
    return (
        v.new_empty(v.shape),
        k.new_empty(sequences, 2, k.shape[2], dtype=torch.float32),
        k.new_empty(tokens, 2, k.shape[2], dtype=torch.float32),
    )


def _backward(
    dy: Tensor, d_end: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, reset: Tensor | None,
    lengths: Tensor | None, cu_seqlens: Tensor | None, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dw, du, dk, dv, d_begin = _backward_fake(dy, d_end, w, u, k, v, reset, lengths, cu_seqlens, kept)
    if not k.numel():
        return dw.zero_(), du.zero_(), dk, dv, d_begin.copy_(d_end)
    if lengths is not None:
        dk.zero_()
        dv.zero_()
    k, v, grid, last, options = _start(k, v, cu_seqlens)
    parts_w, parts_u = d_begin.new_empty(2, grid[0], k.shape[2])
    launch(
        backward_kernel, grid, *_contiguous(dy, d_end, w, u), k, v, *_contiguous(reset, lengths), kept, parts_w,
        parts_u, dk, dv, d_begin, *last, **options,
    )  # fmt: skip
    return dw.copy_(parts_w.sum(0)), du.copy_(parts_u.sum(0)), dk, dv, d_begin


def _backward_fake(
    dy: Tensor, d_end: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, reset: Tensor | None,
    lengths: Tensor | None, cu_seqlens: Tensor | None, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dw, du, dk, dv = (x.new_empty(x.shape) for x in (w, u, k, v))
    return dw, du, dk, dv, d_end.new_empty(d_end.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, u, k, v, initial_state, reset, lengths, cu_seqlens, _ = inputs
    ctx.initial = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(w, u, k, v, reset, lengths, cu_seqlens, output[2])


def _differentiate(ctx: Any, dy: Tensor, d_end: Tensor, d_kept: Tensor) -> tuple[Tensor | None, ...]:
    dw, du, dk, dv, d_begin = BACKWARD(dy, d_end, *ctx.saved_tensors)
    return dw, du, dk, dv, None if ctx.initial is None else d_begin.to(ctx.initial), None, None, None, None


BACKWARD = Primitive("altx_rwkv::wkv4_triton_backward", _backward, _backward_fake, device=DEVICE)
FORWARD = Primitive(
    "altx_rwkv::wkv4_triton", _forward, _forward_fake, save=_save, backward=_differentiate, keep="keep", device=DEVICE
)


def run(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None = None, reset: Tensor | None = None,
    lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `wkv4.wkv4`; no float64."""
    tensors = (w, u, k, v, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, end, _ = FORWARD(*tensors, reset, lengths, cu_seqlens, keep)
    return y, end
