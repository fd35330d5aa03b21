"""Mamba-2's state-space recurrence (SSD)."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.op import KernelError, Op
from altx_kernels.packing import check_cu_seqlens
from altx_mamba.kernels.ssd import cases, native, recurrence, reference, vendor

OP: Op[tuple[Tensor, Tensor]] = Op(
    "ssd",
    reference.ssd,
    # Before the last, which runs anywhere; behind kernels that outran it where both were timed.
    [*recurrence.BACKENDS[:-1], native.NATIVE, vendor.MAMBA_SSM, recurrence.BACKENDS[-1]],
    summary="Mamba-2: a state space with one decay per head, which is a linear recurrence",
    examples=cases.examples,
    workloads=cases.workloads,
)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence: h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T, y_t = C_t h_t + D x_t, head by head.

    Args:
        x: (B, T, H, P), the input of each head.
        dt: (B, T, H), step sizes, >= 0; a token with 0 leaves the state exactly as it was.
        A: (H,), negative.
        B, C: (B, T, G, N), for H / G heads each: head h belongs to group h // (H // G).
        D: (H,), the skip.
        initial_state: (B, H, N, P), h before the first token, or (S, H, N, P) with cu_seqlens; zero if None.
        reset: (B, T) bool; where it is true, h_{t-1} counts as zero.
        cu_seqlens: (S+1,) int, the bounds of S sequences that lie end to end in one row.
        backend: pins a backend by name.

    Returns:
        y (B, T, H, P) in the dtype of x, and the last h in float32, or float64 if an argument is.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Dao & Gu 2024, arXiv:2405.21060, equations 1 and 2.
    """
    sizes = {"S": check_cu_seqlens(x, cu_seqlens)}
    check_shapes(
        OP.name, sizes, x=(x, "B T H P"), dt=(dt, "B T H"), A=(A, "H"), B=(B, "B T G N"), C=(C, "B T G N"), D=(D, "H"),
        initial_state=(initial_state, "S H N P"), reset=(reset, "B T"),
    )  # fmt: skip
    check_floats(OP.name, x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise KernelError(
            f"op {OP.name!r}: x has {sizes['H']} heads, which {sizes['G']} groups of B and C cannot share evenly",
            hint="the number of heads is a multiple of the number of groups",
        )
    if reset is not None and reset.dtype != torch.bool:
        raise KernelError(f"op {OP.name!r}: reset has dtype {reset.dtype}", hint="pass bool")
    return OP(x, dt, A, B, C, D, initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens, backend=backend)
