"""Mamba-3's state-space recurrence, with one input and one output per head (SISO)."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.op import KernelError, Op
from altx_kernels.packing import check_cu_seqlens
from altx_mamba.kernels.mamba3 import cases, recurrence, reference, vendor
from altx_mamba.kernels.mamba3.reference import Result

OP: Op[Result] = Op(
    "mamba3",
    reference.mamba3,
    # Before the last, which runs anywhere; behind those that also take resets, padding and float32.
    [*recurrence.BACKENDS[:-1], vendor.MAMBA_SSM, recurrence.BACKENDS[-1]],
    summary="Mamba-3: a rotating state, discretised by a trapezoid, as one linear recurrence",
    examples=cases.examples,
    workloads=cases.workloads,
)


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    initial_angle: Tensor | None = None,
    initial_k: Tensor | None = None,
    initial_v: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """Mamba-3's recurrence, head by head; the equations are in `reference`.

    Args:
        x: (B, T, H, P), the input of each head.
        dt: (B, T, H), step sizes, >= 0.
        A: (B, T, H), negative.
        B, C: (B, T, G, N), normed, for H / G heads each: head h belongs to group h // (H // G).
        trap: (B, T, H); its sigmoid weighs the new end of a step against the old one.
        angles: (B, T, R), R <= N / 2; the state turns by dt pi tanh(angles).
        B_bias, C_bias: (H, N), added to B and C before they are rotated.
        D: (H,), the skip.
        initial_state, initial_angle, initial_k, initial_v: (B, H, N, P), (B, H, R), (B, H, N) and (B, H, P), the states
            before the first token, (S, ...) with cu_seqlens; zero if None.
        reset: (B, T) bool; where it is true, the states before the token count as zero.
        lengths: (B,) int64; the tokens of a row after so many are padding: they count as zeros and change no state.
        cu_seqlens: (S+1,) int, the bounds of S sequences that lie end to end in one row; not with lengths.
        backend: pins a backend by name.

    Returns:
        y (B, T, H, P) in the dtype of x; h, angle, k and v after the last token, in float32, or float64 if
            an argument is.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles", arXiv:2603.15569.
    """
    sizes = {"S": check_cu_seqlens(x, cu_seqlens)}
    check_shapes(
        OP.name, sizes, x=(x, "B T H P"), dt=(dt, "B T H"), A=(A, "B T H"), B=(B, "B T G N"), C=(C, "B T G N"),
        trap=(trap, "B T H"), angles=(angles, "B T R"), B_bias=(B_bias, "H N"), C_bias=(C_bias, "H N"), D=(D, "H"),
        initial_state=(initial_state, "S H N P"), initial_angle=(initial_angle, "S H R"),
        initial_k=(initial_k, "S H N"), initial_v=(initial_v, "S H P"), reset=(reset, "B T"), lengths=(lengths, "B"),
    )  # fmt: skip
    check_floats(
        OP.name, x=x, dt=dt, A=A, B=B, C=C, trap=trap, angles=angles, B_bias=B_bias, C_bias=C_bias, D=D,
        initial_state=initial_state, initial_angle=initial_angle, initial_k=initial_k, initial_v=initial_v,
    )  # fmt: skip
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise KernelError(
            f"op {OP.name!r}: x has {sizes['H']} heads, which {sizes['G']} groups of B and C cannot share evenly",
            hint="the number of heads is a multiple of the number of groups",
        )
    if 2 * sizes["R"] > sizes["N"]:
        raise KernelError(
            f"op {OP.name!r}: {sizes['R']} angles rotate {2 * sizes['R']} rows of a state that has {sizes['N']}",
            hint="pass at most one angle for two rows",
        )
    if reset is not None and reset.dtype != torch.bool:
        raise KernelError(f"op {OP.name!r}: reset has dtype {reset.dtype}", hint="pass bool")
    if lengths is not None and cu_seqlens is not None:
        raise KernelError(f"op {OP.name!r}: lengths and cu_seqlens exclude each other", hint="pass one of them")
    return OP(
        x, dt, A, B, C, trap, angles, B_bias, C_bias, D,
        initial_state=initial_state, initial_angle=initial_angle, initial_k=initial_k, initial_v=initial_v,
        reset=reset, lengths=lengths, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
