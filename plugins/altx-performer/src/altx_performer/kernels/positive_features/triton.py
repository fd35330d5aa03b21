"""Positive features on a GPU: a program takes one head of one row, token by token, and keeps M in registers."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.common import exp
from altx_kernels.gpu.launching import DEVICE, launch, power_of_2
from altx_kernels.primitive import Primitive
from altx_performer.kernels.positive_features.reference import GONE, LOWEST


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    a, b, half, initial, reset, q, k, decay, final, T, H, F, LOW: tl.constexpr, LEAST: tl.constexpr, BF: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BF)
    there = f < F
    m = tl.full([BF], LOW, tl.float32)
    if initial is not None:
        m = tl.load(initial + row * F + f, there, LOW).to(tl.float32)
    for t in range(T):
        token = row // H * T + t
        head = token * H + row % H
        e = tl.load(b + head * F + f, there, 0.0).to(tl.float32) - tl.load(half + head).to(tl.float32)
        before = m
        if reset is not None:
            before = tl.where(tl.load(reset + token) != 0, LOW, m)
        m = tl.maximum(before, e)
        x = tl.where(there, tl.load(a + head * F + f, there, 0.0).to(tl.float32) + m, float("-inf"))
        tl.store(decay + head * F + f, tl.maximum(before - m, LEAST), there)
        tl.store(k + head * F + f, exp(e - m).to(k.dtype.element_ty), there)
        tl.store(q + head * F + f, exp(x - tl.max(x, 0)).to(q.dtype.element_ty), there)
    tl.store(final + row * F + f, m, there)


def _forward(
    a: Tensor, b: Tensor, half: Tensor, M: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, decay, m = _fake(a, b, half, M, reset)
    rows, length, heads, count = a.shape
    block = power_of_2(count)
    launch(
        forward_kernel, (rows * heads,), a.contiguous(), b.contiguous(), half.contiguous(),
        None if M is None else M.contiguous(), None if reset is None else reset.contiguous(), q, k, decay, m, length,
        heads, count, LOW=LOWEST, LEAST=GONE, BF=block,
        # Within one warp the maximum over a token's features needs no barrier.
        num_warps=1 if block <= 512 else min(16, block // 256),
    )  # fmt: skip
    return q, k, decay, m


def _fake(
    a: Tensor, b: Tensor, half: Tensor, M: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = a.new_empty(a.shape, dtype=torch.float32)
    return a.new_empty(a.shape), a.new_empty(a.shape), wide, wide.new_empty(a.shape[0], *a.shape[2:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, decay, M = output
    ctx.save_for_backward(q, k)
    ctx.mark_non_differentiable(decay, M)
    ctx.half = inputs[2].dtype


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k = ctx.saved_tensors
    db = dk * k
    return dq * q, db, -db.sum(-1, dtype=torch.float32).to(ctx.half), None, None


FORWARD = Primitive(
    "altx_performer::positive_features_triton", _forward, _fake, save=_save, backward=_differentiate, device=DEVICE
)


def run(
    a: Tensor, b: Tensor, half: Tensor, *, M: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `altx_performer.kernels.positive_features.positive_features`; no float64."""
    q, k, decay, m = FORWARD(a, b, half, M, reset)
    return q, k, decay, m
