"""The short causal convolution in C, for CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.packing import bounds
from altx_kernels.primitive import Primitive

LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"conv": "pii" + 10 * "p" + 6 * "i", "conv_backward": "piippii" + 11 * "p" + 6 * "i"},
)

TILE = 8
"""As in native.c."""

SERIAL = 1 << 16
"""Numbers in x below which a second thread costs more than it saves."""


def unavailable(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why it cannot run a call, or None."""
    return None if x.device.type == "cpu" else f"x is on {x.device}, and native code runs on the CPU"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = False,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    result: tuple[Tensor, Tensor] = FORWARD(x, weight, bias, initial_state, reset, cu_seqlens, lengths, activation)
    return result


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, copied only if its channels do not lie side by side."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def _dense(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if value is None or (value.dtype == dtype and value.is_contiguous()):
        return value
    return value.to(dtype).contiguous()


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= SERIAL else 1


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    (batch, tokens, dim), width = x.shape, weight.shape[1]
    dtype = precise(x, weight, bias, initial_state)
    cuts, rows = bounds(x, cu_seqlens), _rows(x, dtype)
    y = torch.empty(batch, tokens, dim, dtype=dtype)
    final = torch.empty(len(cuts) - 1, width - 1, dim, dtype=dtype)
    LIBRARY.call(
        "conv", dtype, rows, rows.stride(0), rows.stride(1), _dense(weight, dtype), _dense(bias, dtype),
        _dense(initial_state, dtype), None if reset is None else reset.contiguous(), cuts,
        None if lengths is None else lengths.contiguous(), torch.empty(batch * tokens, dtype=torch.int32),
        torch.empty(width, dim, dtype=dtype), y, final, len(cuts) - 1, tokens, dim, width, int(activation), _threads(x),
    )  # fmt: skip
    kept = x.dtype if initial_state is None else initial_state.dtype
    return y if y.dtype == x.dtype else y.to(x.dtype), final if final.dtype == kept else final.to(kept)


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial_state; empty where there is no such argument."""
    (batch, tokens, dim), width = x.shape, weight.shape[1]
    dtype = precise(x, weight, bias, initial_state)
    cuts, rows, dy = bounds(x, cu_seqlens), _rows(x, dtype), _rows(dy, dtype)
    dx, total = torch.empty(batch, tokens, dim, dtype=dtype), torch.zeros(width + 1, dim, dtype=dtype)
    dstate = None if initial_state is None else torch.empty(initial_state.shape, dtype=dtype)
    LIBRARY.call(
        "conv_backward", dtype, dy, dy.stride(0), dy.stride(1), _dense(dfinal, dtype), rows, rows.stride(0),
        rows.stride(1), _dense(weight, dtype), _dense(bias, dtype), _dense(initial_state, dtype),
        None if reset is None else reset.contiguous(), cuts, None if lengths is None else lengths.contiguous(),
        torch.empty(batch * tokens, dtype=torch.int32), torch.zeros(TILE + 3 * width, dim, dtype=dtype),
        dx, dstate, total, len(cuts) - 1, tokens, dim, width, int(activation), _threads(x),
    )  # fmt: skip
    return (
        dx.to(x.dtype),
        total[:width].T.to(weight.dtype, memory_format=torch.contiguous_format, copy=True),
        x.new_empty(0) if bias is None else total[width].to(bias.dtype, copy=True),
        x.new_empty(0) if dstate is None or initial_state is None else dstate.to(initial_state.dtype),
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    like = x if initial_state is None else initial_state
    return x.new_empty(x.shape), like.new_empty(count, weight.shape[1] - 1, x.shape[2])


def _fake_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = [x.new_empty(0) if value is None else value.new_empty(value.shape) for value in (bias, initial_state)]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), empty[0], empty[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, initial_state, *rest = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dstate = BACKWARD(dy, dfinal, x, weight, bias, initial_state, *rest, ctx.activation)
    dbias, dstate = None if bias is None else dbias, None if initial_state is None else dstate
    return dx, dweight, dbias, dstate, None, None, None, None


BACKWARD = Primitive("altx::causal_conv1d_backward", _backward, _fake_backward)
FORWARD = Primitive("altx::causal_conv1d", _forward, _fake, save=_save, backward=_differentiate)
