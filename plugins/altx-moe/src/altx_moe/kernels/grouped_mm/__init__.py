"""One matrix product per target, over rows sorted by target: the op, which serves core's `altx.grouped` too.

y = op(x, weight, offsets)    rows offsets[i]:offsets[i+1] of x times weight[i]; 0 in the other rows
z = op(x, y, offsets)         x_i^T y_i of the rows of each target, the gradient of weight
"""

from __future__ import annotations

from torch import Tensor, int64
from torch.library import register_kernel

from altx.grouped import ALIGNED, one_kernel
from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.gpu import triton_backend
from altx_kernels.op import Backend, KernelError, Op
from altx_moe.kernels.grouped_mm import cases, reference
from altx_moe.kernels.grouped_mm.torch import run

LARGEST, ROWS = 1 << 31, 128
"""Numbers between the first and the last of one target's matrix, or so many rows, which a program counts in 32 bits."""


def check(x: Tensor, other: Tensor, offsets: Tensor) -> None:
    """Raises KernelError where the arguments do not fit together."""
    name, shape = ("weight", "N-1 D F") if other.dim() == 3 else ("y", "P F")
    check_shapes("grouped-mm", {}, x=(x, "P D"), offsets=(offsets, "N"), **{name: (other, shape)})
    check_floats("grouped-mm", x=x, **{name: other})
    if x.dtype != other.dtype or offsets.dtype != int64 or not len(offsets):
        raise KernelError(
            f"op 'grouped-mm': got {x.dtype} and {other.dtype}, with {len(offsets)} offsets in {offsets.dtype}",
            hint="pass matrices of one dtype, and offsets in int64, one more than targets",
        )


def _waits(x: Tensor, other: Tensor, offsets: Tensor) -> str | None:
    """Why torch's product of a call would ask the GPU where the targets' rows end, and wait; or None."""
    if x.device.type == "cpu" or (one_kernel(x, other) and other.shape[-1] * x.itemsize % ALIGNED == 0):
        return None
    return (
        "torch's grouped product takes aligned bfloat16 on GPUs of compute capability 9 or 10; others wait for a loop"
    )


def _small(x: Tensor, other: Tensor, offsets: Tensor) -> str | None:
    """Why a program cannot count what it reads and writes, or None."""
    matrix = other.shape[-1] * x.shape[1]
    spans = [matrix, ROWS * max(x.stride()), *([ROWS * max(other.stride())] if other.dim() == 2 else [])]
    if other.dim() == 3:
        spans.append(sum((size - 1) * stride for size, stride in zip(other.shape[1:], other.stride()[1:], strict=True)))
    return f"a tile or the matrix of one target spans {max(spans)} numbers" if max(spans) >= LARGEST else None


OP: Op[Tensor] = Op(
    "grouped-mm",
    reference.grouped_mm,
    [
        Backend("torch", run, _waits),
        triton_backend("altx_moe.kernels.grouped_mm", "x other offsets", _small),
    ],
    check=check,
    summary="one matrix product per target, over rows sorted by target",
    examples=cases.examples,
    workloads=cases.workloads,
)


def _chosen(x: Tensor, other: Tensor, offsets: Tensor) -> Tensor:
    return OP(x, other, offsets)


for name in ("altx::grouped_mm", "altx::grouped_outer"):
    register_kernel(name, ("cpu", "cuda"), _chosen)
