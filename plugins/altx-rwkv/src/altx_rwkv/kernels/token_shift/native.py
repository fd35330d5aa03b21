"""The token shift in C, for CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_rwkv.kernels.token_shift.adjoint import backward_fake, save, through

INPUTS = "pppp" + "iiii"
LIBRARY = Library(Path(__file__).with_name("native.c"), {"shift": INPUTS + "pi", "shift_backward": INPUTS + "pppppi"})

SERIAL = 1 << 16
"""Numbers in x below which a second thread costs more than it saves."""


def unavailable(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why it cannot run a call, or None."""
    return None if x.device.type == "cpu" else f"x is on {x.device}, and native code runs on the CPU"


def token_shift(x: Tensor, mix: Tensor, *, initial_state: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """As the reference."""
    out: Tensor = FORWARD(x, mix, initial_state, reset)
    return out


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= SERIAL else 1


def _inputs(
    x: Tensor, mix: Tensor, initial_state: Tensor | None, reset: Tensor | None
) -> tuple[torch.dtype, list[Tensor | int | None]]:
    """What both functions take first, and in what dtype."""
    dtype = precise(x, mix, initial_state)
    floats = [None if t is None else t.to(dtype).contiguous() for t in (x, mix, initial_state)]
    batch, length, width = x.shape
    reset = None if reset is None else reset.contiguous()
    return dtype, [*floats, reset, batch * length, length, width, len(mix)]


def _forward(x: Tensor, mix: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> Tensor:
    dtype, inputs = _inputs(x, mix, initial_state, reset)
    y = torch.empty(len(mix), *x.shape, dtype=dtype)
    if x.numel():
        LIBRARY.call("shift", dtype, *inputs, y, _threads(x))
    return y if dtype == x.dtype else y.to(x.dtype)


def _forward_fake(x: Tensor, mix: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> Tensor:
    return x.new_empty(mix.shape[0], *x.shape)


def _backward(
    dy: Tensor, x: Tensor, mix: Tensor, initial_state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, mix and the initial state, there or not."""
    dtype, inputs = _inputs(x, mix, initial_state, reset)
    threads, (batch, _, width) = _threads(x), x.shape
    dx, dinitial = torch.empty(x.shape, dtype=dtype), torch.zeros(batch, width, dtype=dtype)
    dmix, carried = torch.zeros(threads, *mix.shape, dtype=dtype), torch.empty(threads, width, dtype=dtype)
    if x.numel():
        dy = dy.to(dtype).contiguous()
        LIBRARY.call("shift_backward", dtype, *inputs, dy, dx, dmix, dinitial, carried, threads)
    like = x if initial_state is None else initial_state
    return dx.to(x.dtype), dmix.sum(0).to(mix.dtype), dinitial.to(like.dtype)


BACKWARD = Primitive("altx::token_shift_backward", _backward, backward_fake)
FORWARD = Primitive("altx::token_shift", _forward, _forward_fake, save=save, backward=through(BACKWARD))
