"""Backend "native": the whole token in one call of C."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_mamba.kernels.one_token import ALONE, writable

LIBRARY = Library(Path(__file__).with_name("native.c"), {"step": "p" * 17 + "i" * 7 + "dddd" + "i"})


def mamba2_step(
    x: Tensor,
    past: Tensor,
    h: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    norm_eps: float,
    dt_limit: tuple[float, float | None] = (0.0, None),
    donate: bool = False,
    pre_weight: Tensor | None = None,
    pre_eps: float = 0.0,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.mamba2_step`."""
    past, h = writable(past, donate), writable(h, donate)
    least, most = dt_limit
    y = _step(
        x, past, h, in_weight, in_bias, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_weight, out_bias,
        least, math.inf if most is None else most, norm_eps, pre_weight, pre_eps, seen,
    )  # fmt: skip
    return y, past, h


def _impl(
    x: Tensor, past: Tensor, h: Tensor, in_weight: Tensor, in_bias: Tensor | None, conv_weight: Tensor,
    conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_weight: Tensor, out_weight: Tensor,
    out_bias: Tensor | None, least: float, most: float, eps: float, pre_weight: Tensor | None, pre_eps: float,
    seen: Tensor | None,
) -> Tensor:  # fmt: skip
    """y as x; `past` and `h` are moved on in place."""
    (rows, _, width), (heads, size, head_dim), (channels, _, taps) = x.shape, h.shape[1:], conv_weight.shape
    inner = heads * head_dim
    threads = torch.get_num_threads() if inner * width > ALONE else 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    work = x.new_empty(rows * (inner + 2 * channels + 2 * heads) + threads * rows * width)
    weights = (
        in_weight, in_bias, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_weight, out_bias, pre_weight,
    )  # fmt: skip
    LIBRARY.call(
        "step", x.dtype, x.contiguous(), past, h, *[w if w is None else w.contiguous() for w in weights], work, y,
        seen, rows, width, heads, head_dim, (channels - inner) // (2 * size), size, taps, least, most, eps, pre_eps,
        threads,
    )  # fmt: skip
    return y


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_step = Primitive("altx_mamba::mamba2_step", _impl, _fake, mutates=("past", "h", "seen"))
