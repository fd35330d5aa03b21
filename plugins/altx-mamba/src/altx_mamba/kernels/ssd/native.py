"""SSD in C, for CPUs: the native linear recurrence between one pass over x before it and one behind it.

Nothing but what the recurrence keeps is kept for the backward pass: v = dt x is made again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.linear_recurrence import native as recurrence
from altx_kernels.native import Library
from altx_kernels.op import Backend
from altx_kernels.primitive import Primitive

LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"scale": "pippiiii", "skip": "ppipiiii", "ssd_backward": "pppippppppiiii"},
)

BLOCK = 32
"""As in native.c."""

SERIAL = 1 << 17
"""Numbers in x below which a second thread costs more than it saves."""


def absent() -> str | None:
    """Why nothing runs on this machine, or None. A compiled graph knows it as a constant."""
    return recurrence.LIBRARY.problem() or LIBRARY.problem()


# All that torch.compiler.assume_constant_result does, but for the time that it takes to import the compiler.
absent._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the native recurrence cannot run the call, or None."""
    return recurrence.unavailable(C, B, x)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`."""
    given = (x, dt, A, B, C, D, initial_state)
    dtype = precise(*given)
    cast = [None if t is None else t.to(dtype) for t in given]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in cast)
    y, h, _ = FORWARD(*cast, reset, cu_seqlens, keep)
    return y.to(x.dtype), h


def _rows(x: Tensor) -> Tensor:
    """x (B, T, H, P) as (tokens, channels), copied only if its tokens do not lie evenly, or their channels apart."""
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """What every C function takes last."""
    batch, tokens, heads, width = x.shape
    return batch * tokens, heads, width, torch.get_num_threads() if x.numel() >= SERIAL else 1


def _scaled(x: Tensor, rows: Tensor, dt: Tensor) -> Tensor:
    v = torch.empty(x.shape, dtype=x.dtype)
    LIBRARY.call("scale", x.dtype, rows, rows.stride(0), dt.contiguous(), v, *_sizes(x))
    return v


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last state, and what the recurrence keeps."""
    rows = _rows(x)
    y, h, kept = recurrence.FORWARD.impl(C, B, _scaled(x, rows, dt), dt * A, initial_state, reset, cu_seqlens, keep)
    if D is not None:
        LIBRARY.call("skip", x.dtype, y, rows, rows.stride(0), D.contiguous(), *_sizes(x))
    return y, h, kept


def _fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found: tuple[Tensor, Tensor, Tensor] = recurrence.FORWARD.op(C, B, x, dt, initial_state, reset, cu_seqlens, keep)
    return found


def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None, kept: Tensor, dy: Tensor | None, dh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D (empty if there is none) and the initial state."""
    rows, dt = _rows(x), dt.contiguous()
    dy = torch.zeros(x.shape, dtype=x.dtype) if dy is None else dy.contiguous()
    v, g = _scaled(x, rows, dt), dt * A
    dC, dB, dv, dg, dh = recurrence.BACKWARD.impl(C, B, v, g, reset, cu_seqlens, kept, dy, dh)
    dx, ddt = torch.empty(x.shape, dtype=x.dtype), torch.empty(dt.shape, dtype=x.dtype)
    dD = torch.empty(0 if D is None else D.shape, dtype=x.dtype)
    LIBRARY.call(
        "ssd_backward", x.dtype, dv, dy, rows, rows.stride(0), dt, None if D is None else D.contiguous(), dx, ddt,
        torch.empty(-(-len(rows) // BLOCK), x.shape[2], dtype=x.dtype), dD, *_sizes(x),
    )  # fmt: skip
    return dx, ddt.addcmul_(dg, A), (dg * dt).sum((0, 1)), dB, dC, dD, dh


def _fake_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None, kept: Tensor, dy: Tensor | None, dh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, ddt, dA, dB, dC = (t.new_empty(t.shape) for t in (x, dt, A, B, C))
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dh = x.new_empty(sequences, x.shape[2], B.shape[3], x.shape[3])
    return dx, ddt, dA, dB, dC, x.new_empty(0 if D is None else D.shape), dh


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, reset, cu_seqlens, _keep = inputs
    ctx.save_for_backward(*tensors, reset, cu_seqlens, output[2])
    ctx.stateful = initial_state is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once, as checkpoints ask
    *gradients, dD, dh = BACKWARD(*saved, dy, dh)
    D = saved[5]
    return *gradients, None if D is None else dD, dh if ctx.stateful else None, None, None, None


BACKWARD = Primitive("altx_mamba::ssd_backward", _backward, _fake_backward)
FORWARD = Primitive("altx_mamba::ssd", _forward, _fake, save=_save, backward=_differentiate, keep="keep")
NATIVE: Backend[tuple[Tensor, Tensor]] = Backend("native", ssd, unavailable, absent)
