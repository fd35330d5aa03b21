"""The op `mamba2-step`: one token of Mamba-2, the whole mixer."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import Backend, Op
from altx_mamba.kernels.mamba2_step import native, reference
from altx_mamba.kernels.mamba2_step.cases import examples, workloads
from altx_mamba.kernels.mamba2_step.check import check
from altx_mamba.kernels.one_token import unavailable

mamba2_step: Op[tuple[Tensor, Tensor, Tensor]] = Op(
    "mamba2-step",
    reference.mamba2_step,
    [Backend("native", native.mamba2_step, unavailable, native.LIBRARY.problem)],
    check=check,
    summary="one token of Mamba-2, from its projection in to its projection out",
    examples=examples,
    workloads=workloads,
)
