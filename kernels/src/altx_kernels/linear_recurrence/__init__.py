"""Linear recurrences with decay: the op that SSD, RetNet, GLA, HGRN-2, RWKV-6 and mLSTM come down to."""

from __future__ import annotations

from torch import Tensor
from torch import bool as boolean

from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.gpu import triton_backend
from altx_kernels.linear_recurrence import cases, native, reference, vendor
from altx_kernels.linear_recurrence.torch import linear_recurrence as chunked
from altx_kernels.op import Backend, KernelError, Op
from altx_kernels.packing import check_cu_seqlens

OP: Op[tuple[Tensor, Tensor]] = Op(
    "linear-recurrence",
    reference.linear_recurrence,
    [
        triton_backend("altx_kernels.linear_recurrence", "q k v g", v=256),
        Backend("fla", vendor.linear_recurrence, vendor.unavailable, vendor.absent),
        Backend("native", native.linear_recurrence, native.unavailable, native.LIBRARY.problem),
        Backend("torch", chunked),
    ],
    summary="linear attention and state spaces: a matrix state with no decay, one per head, or one per key channel",
    examples=cases.examples,
    workloads=cases.workloads,
)


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A matrix per head that decays, takes in k v^T, and is read by q.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t

    Args:
        q, k: (B, T, G, K), read by H / G heads each: head h belongs to group h // (H // G). Nothing scales q.
        v: (B, T, H, V).
        g: log decay, <= 0, -inf allowed: (B, T, H), one for a head; (B, T, H, K), one for a row of S; None, no decay.
        initial_state: (B, H, K, V), S before the first token, or (N, H, K, V) with cu_seqlens; zero if None.
        reset: (B, T) bool; where it is true, S_{t-1} counts as zero.
        cu_seqlens: (N+1,) int, the bounds of N sequences that lie end to end in one row.
        backend: pins a backend by name.

    Returns:
        o (B, T, H, V) in the dtype of v, and the last S (B or N, H, K, V) in float32, or float64 if an argument is.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Yang et al. 2023, arXiv:2312.06635 (GLA), equation 3; Dao & Gu 2024, arXiv:2405.21060 (SSD), equation 1.
    """
    sizes = {"N": check_cu_seqlens(v, cu_seqlens)}
    check_shapes(
        OP.name, sizes, v=(v, "B T H V"), q=(q, "B T G K"), k=(k, "B T G K"),
        g=(g, "B T H" if g is not None and g.dim() == 3 else "B T H K"),
        initial_state=(initial_state, "N H K V"), reset=(reset, "B T"),
    )  # fmt: skip
    check_floats(OP.name, q=q, k=k, v=v, g=g, initial_state=initial_state)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise KernelError(
            f"op {OP.name!r}: v has {sizes['H']} heads, which {sizes['G']} groups of q and k cannot share evenly",
            hint="the number of heads is a multiple of the number of groups",
        )
    if reset is not None and reset.dtype != boolean:
        raise KernelError(f"op {OP.name!r}: reset has dtype {reset.dtype}", hint="pass bool")
    return OP(q, k, v, g, initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens, backend=backend)
