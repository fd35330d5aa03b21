"""Backend "native": the whole token in one call of C."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive

LIBRARY = Library(Path(__file__).with_name("native.c"), {"step": "p" * 16 + "i" * 6 + "di"})

ALONE = 1 << 16
"""Weights below which a second thread costs more than it brings."""

ROWS = 8
"""Rows above which a library's matrix products are faster than one matrix-vector product each."""


def unavailable(x: Tensor, *others: Tensor | None, **named: object) -> str | None:
    """Why `mamba_step` cannot run a call, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, and native code runs on the CPU"
    if x.shape[0] > ROWS:
        return f"{x.shape[0]} rows: it is meant for {ROWS} at the most"
    grad, dtype = torch.is_grad_enabled(), x.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return f"x is {dtype}: it takes float32 and float64"
    for tensor in (x, *others, *named.values()):
        if isinstance(tensor, Tensor):
            if tensor.dtype is not dtype:
                return f"an argument is {tensor.dtype} where x is {dtype}"
            if grad and tensor.requires_grad:
                return "gradients are wanted, and it has none"
    return None


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.mamba_step`."""
    if not donate or not past.is_contiguous():
        past = past.clone(memory_format=torch.contiguous_format)
    if not donate or not h.is_contiguous():
        h = h.clone(memory_format=torch.contiguous_format)
    weights = (in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias)
    return _step(x, past, h, *weights, -1.0 if inner_norm_eps is None else inner_norm_eps), past, h


def _impl(
    x: Tensor, past: Tensor, h: Tensor, in_weight: Tensor, in_bias: Tensor | None, conv_weight: Tensor,
    conv_bias: Tensor | None, x_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    out_weight: Tensor, out_bias: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """y (B, M); `past` and `h` are moved on in place."""
    (rows, width), (inner, size), taps, rank = x.shape, A_log.shape, conv_weight.shape[1], dt_weight.shape[1]
    y = x.new_empty(rows, width)
    work = x.new_empty(rows * (3 * inner + rank + 2 * size))
    weights = (in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias)
    LIBRARY.call(
        "step", x.dtype, x.contiguous(), past, h, *[w if w is None else w.contiguous() for w in weights], work, y,
        rows, width, inner, size, taps, rank, eps, torch.get_num_threads() if inner * width > ALONE else 1,
    )  # fmt: skip
    return y


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_step = Primitive("altx_mamba::step", _impl, _fake, mutates=("past", "h"))
