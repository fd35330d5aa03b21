"""SSD as the linear recurrence that it is: every backend of that op is one of this, but the native one has its own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.linear_recurrence import OP as RECURRENCE
from altx_kernels.op import REFERENCE, Backend


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`, with `backend` of linear-recurrence: q = C, k = B, v = dt x, g = dt A."""
    v, g = (x * dt[..., None]).to(x.dtype), dt.to(precise(dt)) * A
    run = RECURRENCE.backends[backend].fn
    y, h = run(C, B, v, g, initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens)
    return y if D is None else torch.addcmul(y, D[:, None], x).to(y.dtype), h


def unavailable(
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
    backend: str,
) -> str | None:
    """Why `backend` of linear-recurrence cannot run the call, or None."""
    # x and dt stand for v and g, whose shapes, dtypes and devices are theirs.
    return RECURRENCE.backends[backend].unavailable(
        C, B, x, dt, initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens
    )


BACKENDS = [
    Backend(name, partial(ssd, backend=name), partial(unavailable, backend=name), backend.absent)
    for name, backend in RECURRENCE.backends.items()
    if name not in (REFERENCE, "native")
]
