"""The norm behind the recurrence of gated state-space mixers: RMSNorm over groups of channels, and a gate silu(z)."""

from __future__ import annotations

from torch import Tensor

from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.gated_rms_norm import cases, native, reference
from altx_kernels.gpu import triton_backend
from altx_kernels.op import Backend, KernelError, Op

NAME = "gated-rms-norm"

GATED_RMS_NORM: Op[Tensor] = Op(
    NAME,
    reference=reference.gated_rms_norm,
    backends=[
        triton_backend("altx_kernels.gated_rms_norm", "y z weight"),
        Backend("native", native.gated_rms_norm, native.unavailable, native.LIBRARY.problem),
    ],
    summary="RMSNorm over groups of channels, with a gate before or after it",
    examples=cases.examples,
    workloads=cases.workloads,
)


def gated_rms_norm(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    group_size: int,
    gate_first: bool = True,
    backend: str | None = None,
) -> Tensor:
    """weight u / rms(u) with u = y silu(z), or weight y / rms(y) silu(z); rms(u)^2 = eps + mean of u^2 in its group.

    Args:
        y: (..., E).
        z: (..., E), the gate; None is no gate.
        weight: (E,).
        eps: added to the mean square.
        group_size: neighbouring channels that are normed together; E is a multiple.
        gate_first: whether the gate comes before the norm.
        backend: pins one.

    Returns:
        (..., E) in the dtype of y, computed in float32 or, if any argument is, in float64.

    Raises:
        KernelError: if shapes, dtypes or devices do not fit together.

    Source: Dao & Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 7.1; Zhang & Sennrich 2019,
    arXiv:1910.07467, equation 4.
    """
    shape = " ".join([*(f"D{i}" for i in range(y.dim() - 1)), "E"])
    check_shapes(NAME, {}, y=(y, shape), z=(z, shape), weight=(weight, "E"))
    check_floats(NAME, y=y, z=z, weight=weight)
    if group_size < 1 or len(weight) % group_size:
        raise KernelError(
            f"op {NAME!r}: {len(weight)} channels cannot be cut into groups of {group_size}",
            hint="pass a group_size that divides the number of channels",
        )
    return GATED_RMS_NORM(y, z, weight, eps=eps, group_size=group_size, gate_first=gate_first, backend=backend)


__all__ = ["GATED_RMS_NORM", "gated_rms_norm"]
