"""Grouped products on a GPU: a program computes one tile, and finds out for itself which target's it is."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu import INTERPRETED
from altx_kernels.gpu.launching import DEVICE, dot_types, launch, power_of_2
from altx_moe.kernels.grouped_mm.node import fake, node


@triton.jit(do_not_specialize=["P", "n"])
def multiply_kernel(
    x, weight, y, offsets, P, n, D, F, sx, sn, sd, sf,
    NP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(F, BN)
    tile = tl.program_id(0) // across
    # Tiles begin afresh with every target; the last one, n, has the void rows.
    i = tl.arange(0, NP)
    start = tl.load(offsets + i, i <= n, P)
    stop = tl.load(offsets + i + 1, i < n, P)
    tiles = tl.where(i <= n, (stop - start + BM - 1) // BM, 0)
    ends = tl.cumsum(tiles, 0)
    target = tl.sum((ends <= tile).to(tl.int32), 0)
    if target <= n:
        own = i == target
        first = tl.sum(tl.where(own, start + (tile - ends + tiles) * BM, 0), 0)
        last = tl.sum(tl.where(own, stop, 0), 0)
        left = (last - first).to(tl.int32)
        p = tl.arange(0, BM)[:, None]
        f = (tl.program_id(0) % across) * BN + tl.arange(0, BN)[None, :]
        k = tl.arange(0, BK)
        # Only where a tile begins is counted in 64 bits: a pointer for each number would take two registers.
        rows = x + first * sx
        columns = weight + target.to(tl.int64) * sn
        acc = tl.zeros([BM, BN], tl.float32)
        depth = tl.where(target < n, D, 0)
        for d in range(0, depth, BK):
            a = tl.load(rows + (p * sx + k[None, :]), (p < left) & (k[None, :] + d < D), 0.0).to(DT)
            b = tl.load(columns + (k[:, None] * sd + f * sf), (f < F) & (k[:, None] + d < D), 0.0).to(DT)
            acc = tl.dot(a, b, acc, input_precision=PREC)
            rows += BK
            columns += BK * sd
        tl.store(y + first * F + (p * F + f), acc.to(y.dtype.element_ty), (p < left) & (f < F))


@triton.jit
def outer_kernel(
    x, y, out, offsets, D, F, sx, sy,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(F, BN)
    tile = tl.program_id(0)
    target = tl.program_id(1)
    d = (tile // across) * BM + tl.arange(0, BM)[:, None]
    f = (tile % across) * BN + tl.arange(0, BN)[None, :]
    start = tl.load(offsets + target)
    left = (tl.load(offsets + target + 1) - start).to(tl.int32)
    k = tl.arange(0, BK)
    x += start * sx
    y += start * sy
    acc = tl.zeros([BM, BN], tl.float32)
    for p in range(0, left, BK):
        a = tl.load(x + (k[None, :] * sx + d), (k[None, :] + p < left) & (d < D), 0.0).to(DT)
        b = tl.load(y + (k[:, None] * sy + f), (k[:, None] + p < left) & (f < F), 0.0).to(DT)
        acc = tl.dot(a, b, acc, input_precision=PREC)
        x += BK * sx
        y += BK * sy
    tl.store(out + target.to(tl.int64) * D * F + (d * F + f), acc.to(out.dtype.element_ty), (d < D) & (f < F))


def config(dtype: torch.dtype, height: int, width: int) -> dict[str, Any]:
    """A tile's sides, and the threads for it.

    Args:
        height: number of rows that are expected of a target.
        width: number of columns.
    """
    tile = {"BM": min(128, power_of_2(height)), "BN": min(128, power_of_2(width)), "BK": 32}
    types = dot_types(dtype)
    if dtype == torch.float16 and not INTERPRETED:
        # The factors are what they are, so nothing needs TF32's range.
        types = {"DT": tl.float16, "PREC": "tf32"}
    if dtype == torch.float32:
        tile["BN"] = min(64, tile["BN"])
    return tile | types | {"num_warps": 8 if tile["BM"] * tile["BN"] > 64 * 64 else 4}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(x: Tensor, other: Tensor, offsets: Tensor) -> Tensor:
    x, offsets, y = _rows(x), offsets.contiguous(), fake(x, other, offsets)
    P, D = x.shape
    n, F = len(offsets) - 1, other.shape[-1]
    if other.dim() == 3:
        tile = config(x.dtype, triton.cdiv(P, max(n, 1)), F)
        # As many as there can be at most, so that nothing is waited for; those too many do nothing.
        tiles = (triton.cdiv(P, tile["BM"]) + n) * triton.cdiv(F, tile["BN"]) * (P > 0)
        launch(
            multiply_kernel, (tiles,), x, other, y, offsets, P, n, D, F, x.stride(0), *other.stride(),
            NP=power_of_2(n + 1, 1), **tile,
        )  # fmt: skip
        return y
    other = _rows(other)
    tile = config(x.dtype, D, F)
    launch(
        outer_kernel, (triton.cdiv(D, tile["BM"]) * triton.cdiv(F, tile["BN"]), n), x, other, y, offsets, D, F,
        x.stride(0), other.stride(0), **tile,
    )  # fmt: skip
    return y


FORWARD = node("altx_moe::grouped_mm_triton", _forward, DEVICE)


def run(x: Tensor, other: Tensor, offsets: Tensor) -> Tensor:
    """As the reference; no float64."""
    y: Tensor = FORWARD(x, other, offsets)
    return y
