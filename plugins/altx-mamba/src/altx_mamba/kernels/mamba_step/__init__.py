"""The op `mamba-step`: one token of Mamba-1, the whole mixer."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import Backend, Op
from altx_mamba.kernels.mamba_step import native, reference
from altx_mamba.kernels.mamba_step.cases import examples, workloads
from altx_mamba.kernels.mamba_step.check import check
from altx_mamba.kernels.one_token import unavailable

mamba_step: Op[tuple[Tensor, Tensor, Tensor]] = Op(
    "mamba-step",
    reference.mamba_step,
    [Backend("native", native.mamba_step, unavailable, native.LIBRARY.problem)],
    check=check,
    summary="one token of Mamba-1, from its projection in to its projection out",
    examples=examples,
    workloads=workloads,
)
