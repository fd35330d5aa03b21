"""The diagonal state space in C for CPUs: a recurrence, forward and backward, whose states never leave the caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.primitive import Primitive

INPUTS = "pii" + "p" * 5 + "ppp" + "iiii"
LIBRARY = Library(
    Path(__file__).with_name("native.c"), {"ssm": INPUTS + "ppppp" + "i", "ssm_backward": INPUTS + "p" * 12 + "i"}
)

CHUNK = 32
"""Tokens between two states kept for the backward pass, as in native.c."""

LANES = 16
"""Widest vector of native.c, in numbers: room is made for channels in multiples of it."""

SERIAL = 2**19
"""So many states (tokens * H * N) are done before a second thread has woken."""


def unavailable(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, and native code runs on the CPU"
    return None


def diagonal_ssm(
    x: Tensor,
    rate: Tensor,
    c: Tensor,
    b: Tensor | None = None,
    w: Tensor | None = None,
    v: Tensor | None = None,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `diagonal_ssm.diagonal_ssm`."""
    tensors = (x, rate, c, b, w, v, D, initial_state)
    dtype = precise(*tensors)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    lengths = None if lengths is None else lengths.to(torch.int64)
    y, h, _ = FORWARD(*[t if t is None else t.to(dtype) for t in tensors], reset, lengths, keep)
    return y.to(x.dtype), h


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x as rows of tokens, copied where they do not lie evenly; the strides from token to token, and of the planes."""
    planes = x.dim() == 4
    even = x.stride(-1) == 1 or x.shape[-1] == 1
    if even and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x, x.stride(1), x.stride(2) if planes else 0
    x = x.contiguous()
    return x, x.shape[2:].numel(), x.shape[3] if planes else 0


def _inputs(
    x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None, v: Tensor | None, D: Tensor | None,
    reset: Tensor | None, lengths: Tensor | None,
) -> list[Tensor | int | None]:  # fmt: skip
    """What both functions take first."""
    weights = [None if t is None else t.contiguous() for t in (rate, c, b, w, v, D, reset, lengths)]
    return [*_rows(x), *weights, x.shape[0], x.shape[1], rate.shape[0], rate.shape[2]]


def _threads(x: Tensor, rate: Tensor) -> int:
    states = x.shape[0] * x.shape[1] * rate.shape[0] * rate.shape[2]
    blocks = -(-rate.shape[0] // LANES)
    return min(torch.get_num_threads(), blocks) if states > SERIAL else 1


def _padded(rate: Tensor) -> int:
    """H rounded up to whole vectors of any width."""
    return -(-rate.shape[0] // LANES) * LANES


def _kept(x: Tensor, rate: Tensor, keep: bool) -> Tensor:
    """Room for the states at the chunks' starts."""
    chunks = x.shape[0] * ((x.shape[1] + CHUNK - 1) // CHUNK) if keep else 0
    return rate.new_empty(chunks, _padded(rate) * 2 * rate.shape[2])


def _forward(
    x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None, v: Tensor | None, D: Tensor | None,
    initial_state: Tensor | None, reset: Tensor | None, lengths: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = _inputs(x, rate, c, b, w, v, D, reset, lengths)
    y, last, kept = _forward_fake(x, rate, c, b, w, v, D, initial_state, reset, lengths, keep)
    if lengths is not None:
        y.zero_()
    terms = 2 if b is None else 5
    work = x.new_empty(_padded(rate) * 2 * rate.shape[2] * (terms + 1))
    initial = None if initial_state is None else initial_state.contiguous()
    LIBRARY.call("ssm", x.dtype, *inputs, initial, y, last, kept if keep else None, work, _threads(x, rate))
    return y, last, kept


def _forward_fake(
    x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None, v: Tensor | None, D: Tensor | None,
    initial_state: Tensor | None, reset: Tensor | None, lengths: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *rate.shape), _kept(x, rate, keep)


def _backward(
    x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None, v: Tensor | None, D: Tensor | None,
    reset: Tensor | None, lengths: Tensor | None, kept: Tensor, dy: Tensor | None, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = _inputs(x, rate, c, b, w, v, D, reset, lengths)
    dx, drate, dc, db, dw, dv, dD, dinitial = _backward_fake(
        x, rate, c, b, w, v, D, reset, lengths, kept, dy, dlast
    )  # fmt: skip
    if lengths is not None:
        dx.zero_()
    size, threads, terms = 2 * rate.shape[2], _threads(x, rate), 2 if b is None else 5
    # Room for coefficients, their gradients, the state's and that of D; and each thread's, see native.c.
    room = threads * (2 * CHUNK + 2) * (size + 2) * LANES if b is not None else 0
    work = x.new_empty(_padded(rate) * ((2 * terms + 1) * size + 1) + room)
    given = [None if gradient is None else gradient.contiguous() for gradient in (dy, dlast)]
    low_rank = [None if b is None else gradient for gradient in (db, dw, dv)]
    LIBRARY.call(
        "ssm_backward", x.dtype, *inputs, kept, *given, dx, drate, dc, *low_rank, dD, dinitial, work, threads
    )  # fmt: skip
    return dx, drate, dc, db, dw, dv, dD, dinitial


def _backward_fake(
    x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None, v: Tensor | None, D: Tensor | None,
    reset: Tensor | None, lengths: Tensor | None, kept: Tensor, dy: Tensor | None, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = rate.shape if b is not None else (0,)
    db, dw, dv = (rate.new_empty(shape) for _ in range(3))
    return (
        x.new_empty(x.shape), rate.new_empty(rate.shape), rate.new_empty(rate.shape), db, dw, dv,
        rate.new_empty(rate.shape[0]), rate.new_empty(x.shape[0], *rate.shape),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_state, reset, lengths, _ = inputs
    ctx.has_initial = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, reset, lengths, output[2])


def _gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    b, D = saved[3], saved[6]
    dx, drate, dc, db, dw, dv, dD, dinitial = BACKWARD(*saved, dy, dlast)
    low_rank = (None, None, None) if b is None else (db, dw, dv)
    return (
        dx, drate, dc, *low_rank, None if D is None else dD, dinitial if ctx.has_initial else None, None, None, None
    )  # fmt: skip


FORWARD = Primitive("altx::diagonal_ssm", _forward, _forward_fake, save=_save, backward=_gradients, keep="keep")
BACKWARD = Primitive("altx::diagonal_ssm_backward", _backward, _backward_fake)
