"""The selective scan of Mamba-1."""

from __future__ import annotations

from torch import Tensor
from torch import bool as boolean

from altx_kernels import Backend, KernelError, Op
from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.gpu import triton_backend
from altx_kernels.packing import check_cu_seqlens
from altx_mamba.kernels.selective_scan import cases, native, reference, torch, vendor

OP: Op[tuple[Tensor, Tensor]] = Op(
    "selective-scan",
    reference.selective_scan,
    [
        triton_backend("altx_mamba.kernels.selective_scan", "x dt A B C D z dt_bias", A=256),
        Backend("mamba-ssm", vendor.selective_scan, vendor.unavailable, vendor.absent),
        Backend("native", native.selective_scan, native.unavailable, native.LIBRARY.problem),
        Backend("torch", torch.selective_scan),
    ],
    summary="Mamba-1: a diagonal state per channel, whose decay and input depend on the token",
    examples=cases.examples,
    workloads=cases.workloads,
)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """N states per channel that decay, take in the input, and are read out, all as the token says.

        dt' = dt + dt_bias, or softplus(dt + dt_bias)
        h_t = exp(dt'_t A) h_{t-1} + dt'_t B_t x_t,    y_t = (C_t h_t + D x_t) * silu(z_t)

    Args:
        x: (B, T, D).
        dt: (B, T, D), step sizes. A token whose dt' is 0 (with softplus: whose dt is -inf) holds the state exactly.
        A: (D, N), negative where states shall decay.
        B, C: (B, T, N).
        D: (D,), the skip.
        z: (B, T, D), the gate.
        dt_bias: (D,).
        softplus: whether dt goes through softplus.
        initial_state: (B, D, N), h before the first token, or (sequences, D, N) with cu_seqlens; zero if None.
        reset: (B, T) bool; where it is true, h_{t-1} counts as zero.
        cu_seqlens: (sequences + 1,) int, the bounds of sequences that lie end to end in one row.
        backend: pins a backend by name.

    Returns:
        y (B, T, D) in the dtype of x, and the last h (B or sequences, D, N) in float32, or float64 if an argument is.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Gu & Dao 2023, arXiv:2312.00752, Algorithm 2 with equation 2.
    """
    sizes = {"S": check_cu_seqlens(x, cu_seqlens)}
    check_shapes(
        OP.name, sizes, x=(x, "B T D"), dt=(dt, "B T D"), A=(A, "D N"), B=(B, "B T N"), C=(C, "B T N"), D=(D, "D"),
        z=(z, "B T D"), dt_bias=(dt_bias, "D"), initial_state=(initial_state, "S D N"), reset=(reset, "B T"),
    )  # fmt: skip
    check_floats(OP.name, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    if reset is not None and reset.dtype != boolean:
        raise KernelError(f"op {OP.name!r}: reset has dtype {reset.dtype}", hint="pass bool")
    return OP(
        x, dt, A, B, C, D, z, dt_bias, softplus=softplus, initial_state=initial_state, reset=reset,
        cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip


__all__ = ["OP", "selective_scan"]
