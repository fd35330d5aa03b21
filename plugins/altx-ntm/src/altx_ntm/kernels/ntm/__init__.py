"""The NTM's time loop: `reference` to read beside the paper, the others to run."""

from altx_kernels import Backend, Op
from altx_kernels.gpu import triton_backend
from altx_ntm.kernels.ntm import cases, native, reference
from altx_ntm.kernels.ntm import torch as batched
from altx_ntm.kernels.ntm.check import check, too_large

SCAN = Op(
    "ntm",
    reference.scan,
    [
        triton_backend("altx_ntm.kernels.ntm", "slots fresh reads writes", too_large),
        Backend("native", native.scan, native.unavailable, native.LIBRARY.problem),
        Backend("torch", batched.scan, batched.unavailable),
    ],
    check=check,
    summary="reads and writes of a Neural Turing Machine's memory, token by token",
    examples=cases.examples,
    workloads=cases.workloads,
)
"""Reads and writes of T tokens, in the order asked for."""
