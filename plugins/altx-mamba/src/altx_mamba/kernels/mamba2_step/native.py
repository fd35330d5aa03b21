"""Backend "native": the whole token in one call of C."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_mamba.kernels.one_token import ALONE, writable

LIBRARY = Library(Path(__file__).with_name("native.c"), {"step": "p" * 15 + "i" * 7 + "ddd" + "i"})


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.mamba2_step`."""
    past, h = writable(past, donate), writable(h, donate)
    least, most = dt_limit
    y = _step(
        x, past, h, in_weight, in_bias, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_weight, out_bias,
        least, math.inf if most is None else most, norm_eps,
    )  # fmt: skip
    return y, past, h


def _impl(
    x: Tensor, past: Tensor, h: Tensor, in_weight: Tensor, in_bias: Tensor | None, conv_weight: Tensor,
    conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_weight: Tensor, out_weight: Tensor,
    out_bias: Tensor | None, least: float, most: float, eps: float,
) -> Tensor:  # fmt: skip
    """y (B, M); `past` and `h` are moved on in place."""
    (rows, width), (heads, size, head_dim), (channels, taps) = x.shape, h.shape[1:], conv_weight.shape
    inner = heads * head_dim
    y = x.new_empty(rows, width)
    work = x.new_empty(rows * (inner + 2 * channels + 2 * heads))
    weights = (
        in_weight, in_bias, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_weight, out_bias
    )  # fmt: skip
    LIBRARY.call(
        "step", x.dtype, x.contiguous(), past, h, *[w if w is None else w.contiguous() for w in weights], work, y,
        rows, width, heads, head_dim, (channels - inner) // (2 * size), size, taps, least, most, eps,
        torch.get_num_threads() if inner * width > ALONE else 1,
    )  # fmt: skip
    return y


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_step = Primitive("altx_mamba::mamba2_step", _impl, _fake, mutates=("past", "h"))
