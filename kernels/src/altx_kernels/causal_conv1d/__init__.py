"""The short causal depthwise convolution in front of most state-space and linear-attention mixers."""

from __future__ import annotations

from torch import Tensor

from altx_kernels.causal_conv1d import cases, native, reference, vendor
from altx_kernels.causal_conv1d import torch as chunked
from altx_kernels.causal_conv1d.check import check
from altx_kernels.gpu import triton_backend
from altx_kernels.op import Backend, Op

NAME = "causal-conv1d"

CAUSAL_CONV1D: Op[tuple[Tensor, Tensor]] = Op(
    NAME,
    reference=reference.causal_conv1d,
    backends=[
        triton_backend("altx_kernels.causal_conv1d", "x weight bias initial_state"),
        Backend("causal-conv1d", vendor.causal_conv1d, vendor.unavailable, vendor.absent),
        Backend("native", native.causal_conv1d, native.unavailable, native.LIBRARY.problem),
        Backend("torch", chunked.causal_conv1d),
    ],
    summary="short causal depthwise convolution, with bias and silu",
    examples=cases.examples,
    workloads=cases.workloads,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each channel's last K inputs, weighted: y_t = bias + sum_j weight_j x_{t-K+1+j}, j = 0 .. K-1.

    Args:
        x: (B, T, D).
        weight: (D, K), the current token's tap last.
        bias: (D,).
        initial_state: (B, K-1, D), the inputs before the first token; zero if None. (N, K-1, D) with cu_seqlens.
        reset: (B, T) bool; where it is true, every earlier input counts as zero from here on.
        cu_seqlens: (N+1,), the bounds of N sequences laid end to end in one row.
        lengths: (B,) int64; the final state is that after so many tokens of each row, those after them are padding.
        activation: whether y is silu of the above.
        backend: pins one.

    Returns:
        y (B, T, D) in the dtype of x, and the last K-1 inputs, those before the last reset as zeros, in the dtype of
        initial_state, or else of x.

    Raises:
        KernelError: if shapes, dtypes or devices do not fit together.

    Source: Gu & Dao 2023, "Mamba", arXiv:2312.00752, section 3.4.
    """
    check(NAME, x, weight, bias, initial_state, reset, cu_seqlens, lengths)
    return CAUSAL_CONV1D(
        x, weight, bias, initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens, lengths=lengths,
        activation=activation, backend=backend,
    )  # fmt: skip


__all__ = ["CAUSAL_CONV1D", "causal_conv1d"]
