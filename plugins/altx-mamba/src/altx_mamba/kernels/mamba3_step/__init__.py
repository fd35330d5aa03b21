"""The op `mamba3-step`: one token of Mamba-3, the whole mixer."""

from __future__ import annotations

from altx_kernels import Backend, Op
from altx_mamba.kernels.mamba3.reference import Result
from altx_mamba.kernels.mamba3_step import native, reference
from altx_mamba.kernels.mamba3_step.cases import examples, workloads
from altx_mamba.kernels.mamba3_step.check import check
from altx_mamba.kernels.one_token import unavailable

mamba3_step: Op[Result] = Op(
    "mamba3-step",
    reference.mamba3_step,
    [Backend("native", native.mamba3_step, unavailable, native.LIBRARY.problem)],
    check=check,
    summary="one token of Mamba-3, from its projection in to its projection out",
    examples=examples,
    workloads=workloads,
)
