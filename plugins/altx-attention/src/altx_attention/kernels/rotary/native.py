"""Rotation in C, for CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.primitive import Primitive

LIBRARY = Library(Path(__file__).with_name("native.c"), {"rotary": "piiipppiiiiiiiidi"})

SERIAL = 1 << 15
"""Numbers in x below which a second thread costs more than it saves."""


def unavailable(x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> str | None:
    """Why it cannot run a call, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, and native code runs on the CPU"
    return constants(cos, sin)


def constants(cos: Tensor, sin: Tensor) -> str | None:
    """Why a kernel without a gradient of the angles cannot run a call, or None."""
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "it has no gradient of cos and sin"
    return None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, first: int = 0, interleave: bool = False) -> Tensor:
    """As the reference."""
    y: Tensor = NODE(x, cos, sin, first, interleave, False)
    return y


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, first: int, interleave: bool, back: bool) -> Tensor:
    dtype = precise(x, cos, sin)
    rows = x.to(dtype)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty(x.shape, dtype=dtype)
    LIBRARY.call(
        "rotary", dtype, rows, *rows.stride()[:3], cos.to(dtype).contiguous(), sin.to(dtype).contiguous(), y, *x.shape,
        cos.shape[-1], first, int(interleave), int(len(cos) == 1), -1.0 if back else 1.0,
        torch.get_num_threads() if x.numel() >= SERIAL else 1,
    )  # fmt: skip
    return y.to(x.dtype)


def fake(x: Tensor, cos: Tensor, sin: Tensor, first: int, interleave: bool, back: bool) -> Tensor:
    """An empty tensor of the result's shape."""
    return x.new_empty(x.shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the turn back needs."""
    _, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    first, interleave, back = ctx.options
    return NODE(dy, *ctx.saved_tensors, first, interleave, not back), None, None, None, None, None


NODE = Primitive("altx_attention::rotary", _rotary, fake, save=save, backward=_differentiate)
