"""The compiled backend: `native.c` behind torch.library, in float32 and float64 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_performer.kernels.positive_features.reference import LOWEST

LIBRARY = Library(Path(__file__).with_name("native.c"), {"forward": "p" * 8 + "i" * 6, "backward": "p" * 7 + "i" * 3})

SERIAL = 1 << 14
"""Numbers in a below which a second thread costs more than it saves."""


def unavailable(
    a: Tensor, b: Tensor, half: Tensor, *, M: Tensor | None = None, reset: Tensor | None = None
) -> str | None:
    """Native code runs on the CPU."""
    return None if a.device.type == "cpu" else f"a is on {a.device}, and native code runs on the CPU"


def positive_features(
    a: Tensor, b: Tensor, half: Tensor, *, M: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.positive_features`."""
    dtype, out = precise(a, b, half, M), a.dtype
    M = None if M is None else M.detach().to(dtype)
    q, k, decay, M = FORWARD(a.to(dtype), b.to(dtype), half.to(dtype), M, reset)
    return (q, k, decay, M) if out == dtype else (q.to(out), k.to(out), decay, M)


def _threads(a: Tensor) -> int:
    return torch.get_num_threads() if a.numel() >= SERIAL else 1


def _forward(
    a: Tensor, b: Tensor, half: Tensor, M: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, length, heads, count = a.shape
    q, k, decay = (torch.empty(a.shape, dtype=a.dtype) for _ in range(3))
    if M is None:
        m = a.new_full((rows, heads, count), LOWEST)
    else:
        m = M.clone(memory_format=torch.contiguous_format)
    threads = _threads(a)
    # As many parts of a row's heads as give each thread something to do.
    shares = max(1, min(heads, -(-threads // max(rows, 1))))
    LIBRARY.call(
        "forward", a.dtype, a.contiguous(), b.contiguous(), half.contiguous(),
        None if reset is None else reset.contiguous(), q, k, decay, m, rows, length, heads, count, shares, threads,
    )  # fmt: skip
    return q, k, decay, m


def _fake(
    a: Tensor, b: Tensor, half: Tensor, M: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(a.shape), a.new_empty(a.shape), a.new_empty(a[:, 0].shape)


def _backward(q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    da, db, dhalf = torch.empty_like(q), torch.empty_like(q), q.new_empty(q.shape[:-1])
    LIBRARY.call(
        "backward", q.dtype, dq.contiguous(), dk.contiguous(), q, k, da, db, dhalf, dhalf.numel(), q.shape[-1],
        _threads(q),
    )  # fmt: skip
    return da, db, dhalf


def _fake_backward(q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape[:-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, decay, M = output
    ctx.save_for_backward(q, k)
    ctx.mark_non_differentiable(decay, M)


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*BACKWARD(*ctx.saved_tensors, dq, dk), None, None)


BACKWARD = Primitive("altx_performer::positive_features_backward", _backward, _fake_backward)
FORWARD = Primitive("altx_performer::positive_features", _forward, _fake, save=_save, backward=_differentiate)
