"""The token shift on a GPU: a program makes all mixtures of some tokens' channels."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.launching import DEVICE, launch
from altx_kernels.primitive import Primitive
from altx_rwkv.kernels.token_shift.adjoint import backward_fake, save, through

TILE = {"BT": 8, "BD": 128}
"""Tokens and channels of a program."""


@triton.jit
def place(tokens, T, D, reset, BT: tl.constexpr, BD: tl.constexpr):
    """The program's tokens and channels, which of them there are, and which tokens have one before in x, or a row's
    first."""
    i = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    there = i < tokens
    kept = there
    if reset is not None:
        kept = there & (tl.load(reset + i, there, 1) == 0)
    return i, d, there & (d < D), kept & (i % T != 0) & (d < D), kept & (i % T == 0) & (d < D)


@triton.jit
def before_of(x, initial, i, d, T, D, inner, first):
    """The token before each."""
    before = tl.load(x + (i - 1) * D + d, inner, 0.0).to(tl.float32)
    if initial is not None:
        before += tl.load(initial + i // T * D + d, first, 0.0).to(tl.float32)
    return before


@triton.jit(do_not_specialize=["tokens", "T"])
def forward_kernel(x, mix, initial, reset, y, tokens, T, D, N: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    i, d, mask, inner, first = place(tokens, T, D, reset, BT, BD)
    now = tl.load(x + i * D + d, mask, 0.0).to(tl.float32)
    change = before_of(x, initial, i, d, T, D, inner, first) - now
    for n in tl.static_range(N):
        m = tl.load(mix + n * D + d, d < D, 0.0).to(tl.float32)
        tl.store(y + (n * tokens + i) * D + d, (now + m * change).to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens", "T"])
def backward_kernel(
    dy, x, mix, initial, reset, dx, parts, d_initial, tokens, T, D,
    N: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i, d, mask, inner, first = place(tokens, T, D, reset, BT, BD)
    now = tl.load(x + i * D + d, mask, 0.0).to(tl.float32)
    change = before_of(x, initial, i, d, T, D, inner, first) - now
    followed = mask & ((i + 1) % T != 0)
    if reset is not None:
        followed = followed & (tl.load(reset + i + 1, i + 1 < tokens, 1) == 0)
    total = tl.zeros([BT, BD], tl.float32)
    passed = tl.zeros([BT, BD], tl.float32)
    for n in tl.static_range(N):
        m = tl.load(mix + n * D + d, d < D, 0.0).to(tl.float32)
        g = tl.load(dy + (n * tokens + i) * D + d, mask, 0.0).to(tl.float32)
        later = tl.load(dy + (n * tokens + i + 1) * D + d, followed, 0.0).to(tl.float32)
        total += g * (1 - m) + later * m
        passed += g * m
        at = (tl.program_id(0) * N + n) * D + d
        tl.store(parts + at, tl.sum(g * change, 0)[None, :], d < D)
    tl.store(dx + i * D + d, total.to(dx.dtype.element_ty), mask)
    if d_initial is not None:
        tl.store(d_initial + i // T * D + d, passed.to(d_initial.dtype.element_ty), first)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _forward(x: Tensor, mix: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> Tensor:
    y = x.new_empty(len(mix), *x.shape)
    (batch, length, width), count = x.shape, len(mix)
    grid = (triton.cdiv(batch * length, TILE["BT"]), triton.cdiv(width, TILE["BD"]))
    inputs = _contiguous(x, mix, initial_state, reset)
    launch(forward_kernel, grid, *inputs, y, batch * length, length, width, N=count, **TILE, num_warps=4)
    return y


def _forward_fake(x: Tensor, mix: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> Tensor:
    return x.new_empty(mix.shape[0], *x.shape)


def _backward(
    dy: Tensor, x: Tensor, mix: Tensor, initial_state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dmix, dinitial = backward_fake(dy, x, mix, initial_state, reset)
    dinitial.zero_()
    (batch, length, width), count = x.shape, len(mix)
    grid = (triton.cdiv(batch * length, TILE["BT"]), triton.cdiv(width, TILE["BD"]))
    parts = torch.empty(grid[0], count, width, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel, grid, *_contiguous(dy, x, mix, initial_state, reset), dx, parts, dinitial, batch * length,
        length, width, N=count, **TILE, num_warps=4,
    )  # fmt: skip
    return dx, dmix.copy_(parts.sum(0)), dinitial


BACKWARD = Primitive("altx_rwkv::token_shift_triton_backward", _backward, backward_fake, device=DEVICE)
FORWARD = Primitive(
    "altx_rwkv::token_shift_triton", _forward, _forward_fake, save=save, backward=through(BACKWARD), device=DEVICE
)


def run(x: Tensor, mix: Tensor, *, initial_state: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """As `token_shift.token_shift`; no float64."""
    y: Tensor = FORWARD(x, mix, initial_state, reset)
    return y
