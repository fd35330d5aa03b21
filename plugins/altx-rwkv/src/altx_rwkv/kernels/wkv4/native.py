"""WKV of RWKV-4 in C for CPUs, forward and backward each one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.packing import check_cu_seqlens, token_rows
from altx_kernels.primitive import Primitive
from altx_rwkv.kernels.wkv4.reference import EMPTY

INPUTS = "pi" * 2 + "pp" + "ppp" + "iii"
LIBRARY = Library(
    Path(__file__).with_name("native.c"), {"wkv4": INPUTS + "ppp" + "i", "wkv4_backward": INPUTS + "p" * 7 + "i"}
)

SERIAL = 2**15
"""So many numbers of k are done before a second thread has woken."""


def unavailable(w: Tensor, u: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if k.device.type != "cpu":
        return f"k is on {k.device}, and native code runs on the CPU"
    return None


def wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None = None, reset: Tensor | None = None,
    lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `wkv4.wkv4`."""
    tensors = (w, u, k, v, initial_state)
    dtype = precise(*tensors)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    bounds = None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64)
    y, last, _ = FORWARD(*[t if t is None else t.to(dtype) for t in tensors], reset, lengths, bounds, keep)
    return y.to(v.dtype), last


def _inputs(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, reset: Tensor | None, lengths: Tensor | None, bounds: Tensor | None
) -> list[Tensor | int | None]:
    """What both functions take first."""
    arguments: list[Tensor | int | None] = [*token_rows(k), *token_rows(v)]
    for part in (w, u, bounds, lengths, reset):
        arguments.append(None if part is None else part.contiguous())
    return [*arguments, k.shape[1], _sequences(k, bounds), k.shape[2]]


def _sequences(k: Tensor, bounds: Tensor | None) -> int:
    return k.shape[0] if bounds is None else bounds.shape[0] - 1


def _threads(k: Tensor) -> int:
    return torch.get_num_threads() if k.numel() > SERIAL else 1


def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    lengths: Tensor | None, bounds: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_cu_seqlens(k, bounds)  # once more, since a compiled graph does not look at values, and C does not ask
    y, last, kept = _forward_fake(w, u, k, v, initial_state, reset, lengths, bounds, keep)
    if initial_state is None:
        last[:, 0], last[:, 1] = 0, EMPTY
    else:
        last.copy_(initial_state)
    inputs = _inputs(w, u, k, v, reset, lengths, bounds)
    LIBRARY.call("wkv4", k.dtype, *inputs, y, last, kept if keep else None, _threads(k))
    return y, last, kept


def _forward_fake(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    lengths: Tensor | None, bounds: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, width = k.shape[0] * k.shape[1], k.shape[2]
    return (
        k.new_empty(k.shape),
        k.new_empty(_sequences(k, bounds), 2, width),
        k.new_empty(tokens if keep else 0, 2, width),
    )


def _backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, reset: Tensor | None, lengths: Tensor | None, bounds: Tensor | None,
    kept: Tensor, dy: Tensor | None, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dw, du, dk, dv, dstate = _backward_fake(w, u, k, v, reset, lengths, bounds, kept, dy, dlast)
    for total in (dw, du):
        total.zero_()
    if dlast is None:
        dstate.zero_()
    else:
        dstate.copy_(dlast)
    inputs = _inputs(w, u, k, v, reset, lengths, bounds)
    dy = None if dy is None else dy.contiguous()
    LIBRARY.call("wkv4_backward", k.dtype, *inputs, kept, dy, dk, dv, dw, du, dstate, _threads(k))
    return dw, du, dk, dv, dstate


def _backward_fake(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, reset: Tensor | None, lengths: Tensor | None, bounds: Tensor | None,
    kept: Tensor, dy: Tensor | None, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dw, du, dk, dv = (x.new_empty(x.shape) for x in (w, u, k, v))
    return dw, du, dk, dv, k.new_empty(_sequences(k, bounds), 2, k.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, u, k, v, initial_state, reset, lengths, bounds, _ = inputs
    ctx.has_initial = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(w, u, k, v, reset, lengths, bounds, output[2])


def _gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: None) -> tuple[Tensor | None, ...]:
    dw, du, dk, dv, dinitial = BACKWARD(*ctx.saved_tensors, dy, dlast)
    return dw, du, dk, dv, dinitial if ctx.has_initial else None, None, None, None, None


FORWARD = Primitive("altx::wkv4", _forward, _forward_fake, save=_save, backward=_gradients, keep="keep")
BACKWARD = Primitive("altx::wkv4_backward", _backward, _backward_fake)
