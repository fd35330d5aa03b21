"""The selective scan in C for CPUs: forward and backward each one pass, with dt's softplus and the gate inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.packing import check_cu_seqlens, token_rows
from altx_kernels.primitive import Primitive

INPUTS = "pi" * 5 + "ppp" + "pp" + "iiiii"
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"scan": INPUTS + "ppppp" + "i", "scan_backward": INPUTS + "ppp" + "p" * 10 + "ii"},
)

CHUNK = 16
"""Tokens between two states kept for the backward pass, as in native.c."""

LANES = 16
"""Widest vector of native.c, in numbers: room is made for channels in multiples of it."""

SERIAL = 2**18
"""So many states (tokens * D * N) are done before a second thread has woken."""


def unavailable(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, and native code runs on the CPU"
    return None


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    softplus: bool = False,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `selective_scan.selective_scan`."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    dtype = precise(*tensors)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    bounds = None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64)
    y, h, _ = FORWARD(*[t if t is None else t.to(dtype) for t in tensors], reset, bounds, softplus, keep)
    return y.to(x.dtype), h


def _inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    reset: Tensor | None, bounds: Tensor | None, softplus: bool,
) -> list[Tensor | int | None]:  # fmt: skip
    """What both functions take first."""
    arguments: list[Tensor | int | None] = []
    for tensor in (x, dt, z, B, C):
        arguments += (None, 0) if tensor is None else token_rows(tensor)
    for part in (A, D, dt_bias, bounds, reset):
        arguments.append(None if part is None else part.contiguous())
    arguments += [x.shape[1], _sequences(x, bounds), *A.shape, int(softplus)]
    return arguments


def _sequences(x: Tensor, bounds: Tensor | None) -> int:
    return x.shape[0] if bounds is None else bounds.shape[0] - 1


def _kept(x: Tensor, A: Tensor, bounds: Tensor | None, keep: bool) -> Tensor:
    """Room for the states at chunks' starts, each sequence's last chunk being a shorter one."""
    chunks = x.shape[0] * x.shape[1] // CHUNK + _sequences(x, bounds)
    return x.new_empty(chunks if keep else 0, _padded(A) * A.shape[1])


def _padded(A: Tensor) -> int:
    return -(-A.shape[0] // LANES) * LANES


def _threads(x: Tensor, A: Tensor) -> int:
    enough = x.shape[0] * x.shape[1] * A.numel() > SERIAL
    return min(torch.get_num_threads(), _padded(A) // LANES) if enough else 1


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, reset: Tensor | None, bounds: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_cu_seqlens(x, bounds)  # once more, since a compiled graph does not look at values, and C does not ask
    inputs = _inputs(x, dt, A, B, C, D, z, dt_bias, reset, bounds, softplus)
    y, last, kept = _forward_fake(x, dt, A, B, C, D, z, dt_bias, initial_state, reset, bounds, softplus, keep)
    work = x.new_empty(_padded(A) * (2 * A.shape[1] + 1))
    initial = None if initial_state is None else initial_state.contiguous()
    LIBRARY.call("scan", x.dtype, *inputs, initial, y, last, kept if keep else None, work, _threads(x, A))
    return y, last, kept


def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, reset: Tensor | None, bounds: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(_sequences(x, bounds), *A.shape), _kept(x, A, bounds, keep)


def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    reset: Tensor | None, bounds: Tensor | None, softplus: bool, kept: Tensor, dy: Tensor | None, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = _inputs(x, dt, A, B, C, D, z, dt_bias, reset, bounds, softplus)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = _backward_fake(
        x, dt, A, B, C, D, z, dt_bias, reset, bounds, softplus, kept, dy, dlast
    )
    threads, states = _threads(x, A), A.shape[1]
    if threads > 1:
        # Zeros, in case fewer threads come than were asked for.
        dB, dC = (x.new_zeros(threads, *tensor.shape) for tensor in (dB, dC))
    work = x.new_empty(_padded(A) * (3 * states + 3) + threads * 2 * CHUNK * states * LANES)
    given = [None if gradient is None else gradient.contiguous() for gradient in (dy, dlast)]
    LIBRARY.call(
        "scan_backward", x.dtype, *inputs, kept, *given, dx, ddt, None if z is None else dz, dB, dC, dA, dD, dbias,
        dinitial, work, x.shape[0] * x.shape[1], threads,
    )  # fmt: skip
    if threads > 1:
        dB, dC = dB.sum(0), dC.sum(0)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def _backward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    reset: Tensor | None, bounds: Tensor | None, softplus: bool, kept: Tensor, dy: Tensor | None, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, ddt, dA, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C))
    dD, dbias = (A.new_empty(A.shape[0]) for _ in range(2))
    dz = x.new_empty(x.shape if z is not None else (0,))
    return dx, ddt, dA, dB, dC, dD, dz, dbias, x.new_empty(_sequences(x, bounds), *A.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_state, reset, bounds, ctx.softplus, _ = inputs
    ctx.has_initial = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, reset, bounds, output[2])


def _gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, z, dt_bias, reset, bounds, kept = ctx.saved_tensors
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = BACKWARD(
        x, dt, A, B, C, D, z, dt_bias, reset, bounds, ctx.softplus, kept, dy, dlast
    )
    return (
        dx, ddt, dA, dB, dC, None if D is None else dD, None if z is None else dz, None if dt_bias is None else dbias,
        dinitial if ctx.has_initial else None, None, None, None, None,
    )  # fmt: skip


FORWARD = Primitive("altx::selective_scan", _forward, _forward_fake, save=_save, backward=_gradients, keep="keep")
BACKWARD = Primitive("altx::selective_scan_backward", _backward, _backward_fake)
