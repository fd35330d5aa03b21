"""The gated RMS norm on a GPU: a program norms one group of channels of a few rows at a time."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gated_rms_norm.primitives import fake_backward, primitives
from altx_kernels.gpu.common import sigmoid
from altx_kernels.gpu.launching import DEVICE, launch, power_of_2, processors

TILE = 2048
"""Numbers that a program holds of each tensor, at 16 a thread, unless one group is larger."""


@triton.jit(do_not_specialize=["R"])
def forward_kernel(
    y, z, weight, out, R, sy, sz, E, SIZE, EPS: tl.constexpr, FIRST: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    d = tl.arange(0, BS)[None, :]
    c = tl.program_id(1) * SIZE + d
    mask = (i < R) & (d < SIZE)
    u = tl.load(y + i * sy + c, mask, 0.0).to(tl.float32)
    if z is not None:
        x = tl.load(z + i * sz + c, mask, 0.0).to(tl.float32)
        silu = x * sigmoid(x)
        if FIRST:
            u *= silu
    r = tl.rsqrt(tl.sum(u * u, 1) / SIZE + EPS)[:, None]
    u *= r * tl.load(weight + c, d < SIZE, 0.0).to(tl.float32)
    if z is not None and not FIRST:
        u *= silu
    tl.store(out + i * E + c, u.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["R", "L"])
def backward_kernel(
    g, y, z, weight, dy, dz, parts, R, L, sg, sy, sz, E, SIZE,
    EPS: tl.constexpr, FIRST: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The gradients of y and z, and what L rows add to that of weight."""
    p = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BS)[None, :]
    c = tl.program_id(1) * SIZE + d
    w = tl.load(weight + c, d < SIZE, 0.0).to(tl.float32)
    total = tl.zeros([BR, BS], tl.float32)
    for first in range(0, L, BR):
        i = p * L + first + tl.arange(0, BR)[:, None]
        mask = (i < R) & (d < SIZE)
        own = tl.load(y + i * sy + c, mask, 0.0).to(tl.float32)
        dout = tl.load(g + i * sg + c, mask, 0.0).to(tl.float32)
        u = own
        q = dout * w
        if z is not None:
            x = tl.load(z + i * sz + c, mask, 0.0).to(tl.float32)
            s = sigmoid(x)
            silu = x * s
            slope = s + silu * (1 - s)
            if FIRST:
                u *= silu
            else:
                slope *= q
                q *= silu
                dout *= silu
        r = tl.rsqrt(tl.sum(u * u, 1) / SIZE + EPS)[:, None]
        pull = r * (r * (r * (tl.sum(u * q, 1) / SIZE)[:, None]))
        du = q * r - u * pull
        total += dout * u * r
        if z is not None:
            if FIRST:
                slope *= du * own
                du *= silu
            else:
                slope *= own * r
            tl.store(dz + i * E + c, slope.to(dz.dtype.element_ty), mask)
        tl.store(dy + i * E + c, du.to(dy.dtype.element_ty), mask)
    tl.store(parts + p * E + c, tl.sum(total, 0)[None, :], d < SIZE)


def config(size: int, gate_first: bool) -> dict[str, Any]:
    """A tile's sides, and the threads for it."""
    width = power_of_2(size, 1)
    height = max(1, TILE // width)
    return {"FIRST": gate_first, "BR": height, "BS": width, "num_warps": min(16, max(4, height * width // 512))}


def _rows(x: Tensor) -> Tensor:
    """x (rows, E) with channels side by side."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _forward(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, gate_first: bool) -> Tensor:
    out = y.new_empty(y.shape)
    rows, gate = _rows(y), None if z is None else _rows(z)
    tile = config(group_size, gate_first)
    (R, E), sz = rows.shape, 0 if gate is None else gate.stride(0)
    launch(
        forward_kernel, (triton.cdiv(R, tile["BR"]), E // group_size), rows, gate, weight.contiguous(), out, R,
        rows.stride(0), sz, E, group_size, EPS=eps, **tile,
    )  # fmt: skip
    return out


def _backward(
    g: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, gate_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dz, dweight = fake_backward(g, y, z, weight, eps, group_size, gate_first)
    dout, rows, gate = _rows(g), _rows(y), None if z is None else _rows(z)
    tile = config(group_size, gate_first)
    (R, E), sz, height = rows.shape, 0 if gate is None else gate.stride(0), tile["BR"]
    # So many rows a program that the GPU is filled a few times; their sums are added up in a fixed order.
    programs = max(1, 4 * processors(y.device) * group_size // max(E, 1))
    length = max(1, triton.cdiv(triton.cdiv(R, programs), height)) * height
    number = triton.cdiv(R, length)
    parts = y.new_empty(number, E, dtype=torch.float32)
    launch(
        backward_kernel, (number, E // group_size), dout, rows, gate, weight.contiguous(), dy, dz, parts, R, length,
        dout.stride(0), rows.stride(0), sz, E, group_size, EPS=eps, **tile,
    )  # fmt: skip
    return dy, dz, dweight.copy_(parts.sum(0))


FORWARD, BACKWARD = primitives("gated_rms_norm_triton", _forward, _backward, DEVICE)


def run(
    y: Tensor, z: Tensor | None, weight: Tensor, *, eps: float, group_size: int, gate_first: bool
) -> Tensor:  # fmt: skip
    """As `altx_kernels.gated_rms_norm.gated_rms_norm`; no float64."""
    out: Tensor = FORWARD(y, z, weight, eps, group_size, gate_first)
    return out
