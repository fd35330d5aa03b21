"""Backend "native": the whole token in one call of C."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_mamba.kernels.mamba3.reference import Result
from altx_mamba.kernels.one_token import ALONE, writable

LIBRARY = Library(Path(__file__).with_name("native.c"), {"step": "p" * 18 + "i" * 7 + "ddd" + "ii"})


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
    """As `reference.mamba3_step`."""
    h, angle, k, v = writable(h, donate), writable(angle, donate), writable(k, donate), writable(v, donate)
    y = _step(
        x, h, angle, k, v, in_weight, dt_bias, B_weight, C_weight, B_bias, C_bias, D, norm_weight, out_weight,
        norm_eps, A_floor, heavy_tail, pre_weight, pre_eps, seen,
    )  # fmt: skip
    return y, h, angle, k, v


def _impl(
    x: Tensor, h: Tensor, angle: Tensor, k: Tensor, v: Tensor, in_weight: Tensor, dt_bias: Tensor, B_weight: Tensor,
    C_weight: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor, norm_weight: Tensor | None, out_weight: Tensor,
    eps: float, A_floor: float, heavy_tail: bool, pre_weight: Tensor | None, pre_eps: float, seen: Tensor | None,
) -> Tensor:  # fmt: skip
    """y as x; the states are moved on in place."""
    (rows, _, width), (heads, size, head_dim), angles, projected = x.shape, h.shape[1:], angle.shape[2], len(in_weight)
    inner = heads * head_dim
    threads = torch.get_num_threads() if inner * width > ALONE else 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    work = x.new_empty(rows * projected + threads * (3 * size + 2 * angles) + threads * rows * width)
    weights = (in_weight, dt_bias, B_weight, C_weight, B_bias, C_bias, D, norm_weight, out_weight, pre_weight)
    LIBRARY.call(
        "step", x.dtype, x.contiguous(), h, angle, k, v, *[w if w is None else w.contiguous() for w in weights], work,
        y, seen, rows, width, heads, head_dim, (projected - 2 * inner - 3 * heads - angles) // (2 * size), size, angles,
        eps, A_floor, pre_eps, heavy_tail, threads,
    )  # fmt: skip
    return y


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_step = Primitive("altx_mamba::mamba3_step", _impl, _fake, mutates=("h", "angle", "k", "v", "seen"))
