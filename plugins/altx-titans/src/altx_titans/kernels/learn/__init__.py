"""The loop over chunks of Titans and TTT: `reference` to read, the others to run."""

from altx_kernels import Backend, Op
from altx_kernels.gpu import triton_backend
from altx_titans.kernels.learn import cases, flat, native, reference
from altx_titans.kernels.learn.check import NAME, check

LEARN = Op(
    NAME,
    reference.learn,
    [
        triton_backend("altx_titans.kernels.learn", "network chunks weights start moving fresh norm", flat.too_large),
        Backend("native", native.learn, native.unavailable, native.LIBRARY.problem),
    ],
    check=check,
    summary="chunks of a memory that is a network's weights, learned by gradient descent (Titans, TTT)",
    examples=cases.examples,
    workloads=cases.workloads,
)
"""N chunks, read and written."""
