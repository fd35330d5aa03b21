"""The DNC's time loop: `reference` to read beside the paper, the others to run."""

from altx_kernels import Backend, Op
from altx_kernels.gpu import triton_backend
from altx_ntm.kernels.dnc import cases, native, reference
from altx_ntm.kernels.dnc.check import check, too_large

SCAN = Op(
    "dnc",
    reference.scan,
    [
        triton_backend("altx_ntm.kernels.dnc", "slots fresh reads writes", too_large),
        Backend("native", native.scan, native.unavailable, native.LIBRARY.problem),
    ],
    check=check,
    summary="writes and reads of a Differentiable Neural Computer's memory, token by token",
    examples=cases.examples,
    workloads=cases.workloads,
)
"""Writes and reads of T tokens."""
