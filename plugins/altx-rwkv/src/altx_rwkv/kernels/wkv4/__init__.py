"""The WKV operator of RWKV-4."""

from __future__ import annotations

from torch import Tensor, int64
from torch import bool as boolean

from altx_kernels import Backend, KernelError, Op
from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.gpu import triton_backend
from altx_kernels.packing import check_cu_seqlens
from altx_rwkv.kernels.wkv4 import cases, native, reference
from altx_rwkv.kernels.wkv4 import torch as loop

EMPTY = reference.EMPTY

OP: Op[tuple[Tensor, Tensor]] = Op(
    "wkv4",
    reference.wkv4,
    [
        triton_backend("altx_rwkv.kernels.wkv4", "w u k v initial_state"),
        Backend("native", native.wkv4, native.unavailable, native.LIBRARY.problem),
        Backend("torch", loop.wkv4),
    ],
    summary="RWKV-4: a mean of all values so far for every channel, weighted by keys that decay",
    examples=cases.examples,
    workloads=cases.workloads,
)


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Every channel's values so far, averaged with weights exp(k_i + (t - 1 - i) w), the current one's exp(k_t + u).

    The state of a channel is the mean of the values so far and the logarithm of their total weight, so nothing
    overflows, whatever the keys.

    Args:
        w: (D,), the log decay of a token, <= 0.
        u: (D,), what the current token's key has added.
        k, v: (B, T, D).
        initial_state: (B, 2, D), mean and log weight before the first token, or (N, 2, D) with cu_seqlens. None is
            a mean of nothing: 0 with the log weight `EMPTY`.
        reset: (B, T) bool; where it is true, all earlier tokens count as nothing.
        lengths: (B,) int64; the tokens after so many of each row are padding, which the state does not see.
        cu_seqlens: (N+1,) int, the bounds of N sequences that lie end to end in one row; not with lengths.
        backend: pins a backend by name.

    Returns:
        y (B, T, D) in the dtype of v, 0 at padding, and the last state (B or N, 2, D) in float32, or float64
        if an argument is.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, equation 16.
    """
    sizes = {"N": check_cu_seqlens(k, cu_seqlens)}
    check_shapes(
        OP.name, sizes, k=(k, "B T D"), v=(v, "B T D"), w=(w, "D"), u=(u, "D"), initial_state=(initial_state, "N 2 D"),
        reset=(reset, "B T"), lengths=(lengths, "B"),
    )  # fmt: skip
    if sizes.get("2", 2) != 2:
        raise KernelError(f"op {OP.name!r}: initial_state has {sizes['2']} rows", hint="pass two: mean and log weight")
    check_floats(OP.name, w=w, u=u, k=k, v=v, initial_state=initial_state)
    if reset is not None and reset.dtype != boolean:
        raise KernelError(f"op {OP.name!r}: reset has dtype {reset.dtype}", hint="pass bool")
    if lengths is not None and (cu_seqlens is not None or lengths.dtype != int64):
        what = "comes with cu_seqlens" if cu_seqlens is not None else f"has dtype {lengths.dtype}"
        raise KernelError(f"op {OP.name!r}: lengths {what}", hint="pass int64, for a batch that is not packed")
    return OP(
        w, u, k, v, initial_state=initial_state, reset=reset, lengths=lengths, cu_seqlens=cu_seqlens, backend=backend
    )


__all__ = ["EMPTY", "OP", "wkv4"]
