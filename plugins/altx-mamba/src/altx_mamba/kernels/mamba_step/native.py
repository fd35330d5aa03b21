"""Backend "native": the whole token in one call of C."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_mamba.kernels.one_token import ALONE, writable

LIBRARY = Library(Path(__file__).with_name("native.c"), {"step": "p" * 18 + "i" * 6 + "dd" + "i"})


def mamba_step(
    x: Tensor,
    past: Tensor,
    h: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    inner_norm_eps: float | None = None,
    donate: bool = False,
    pre_weight: Tensor | None = None,
    pre_eps: float = 0.0,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.mamba_step`."""
    past, h = writable(past, donate), writable(h, donate)
    weights = (in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias)
    eps = -1.0 if inner_norm_eps is None else inner_norm_eps
    return _step(x, past, h, *weights, eps, pre_weight, pre_eps, seen), past, h


def _impl(
    x: Tensor, past: Tensor, h: Tensor, in_weight: Tensor, in_bias: Tensor | None, conv_weight: Tensor,
    conv_bias: Tensor | None, x_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    out_weight: Tensor, out_bias: Tensor | None, eps: float, pre_weight: Tensor | None, pre_eps: float,
    seen: Tensor | None,
) -> Tensor:  # fmt: skip
    """y as x; `past` and `h` are moved on in place."""
    (rows, _, width), (inner, size), taps, rank = x.shape, A_log.shape, conv_weight.shape[2], dt_weight.shape[1]
    threads = torch.get_num_threads() if inner * width > ALONE else 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    work = x.new_empty(rows * (3 * inner + rank + 2 * size) + threads * rows * width)
    weights = (
        in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias,
        pre_weight,
    )  # fmt: skip
    LIBRARY.call(
        "step", x.dtype, x.contiguous(), past, h, *[w if w is None else w.contiguous() for w in weights], work, y,
        seen, rows, width, inner, size, taps, rank, eps, pre_eps, threads,
    )  # fmt: skip
    return y


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_step = Primitive("altx_mamba::step", _impl, _fake, mutates=("past", "h", "seen"))
