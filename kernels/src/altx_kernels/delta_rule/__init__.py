"""The delta rule with a matrix decay, diagonal plus rank one: what DeltaNet, Gated DeltaNet, KDA and RWKV-7 share."""

from __future__ import annotations

from torch import Tensor
from torch import bool as boolean  # this package's own torch is a backend

from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.delta_rule import cases, native, reference, vendor
from altx_kernels.delta_rule.torch import delta_rule as chunked
from altx_kernels.gpu import triton_backend
from altx_kernels.op import Backend, KernelError, Op
from altx_kernels.packing import check_cu_seqlens

NAME = "delta-rule"

DELTA_RULE: Op[tuple[Tensor, Tensor]] = Op(
    NAME,
    reference=reference.delta_rule,
    backends=[
        Backend("fla", vendor.delta_rule, vendor.unavailable, vendor.absent),
        # Token by token, which chunks beat over long sequences.
        triton_backend("altx_kernels.delta_rule", "q k v a b g", q=256),
        Backend("native", native.delta_rule, native.unavailable, native.LIBRARY.problem),
        Backend("torch", chunked),
    ],
    summary="a matrix state that decays by a diagonal plus rank one: DeltaNet, Gated DeltaNet, KDA, RWKV-7",
    examples=cases.examples,
    workloads=cases.workloads,
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A matrix per head that decays, has a_t (b_t^T S) and k_t v_t^T added, and is read by q.

        S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T,    o_t = q_t S_t

    `altx_kernels.delta_rule.reference` says what a, b and g are in DeltaNet, Gated DeltaNet, KDA and RWKV-7.

    Args:
        q, k, a, b: (B, T, H, K). Nothing scales q; b reads S_{t-1} before it decays.
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

    Source: Peng et al. 2025, "RWKV-7 'Goose'", arXiv:2503.14456, equation 3, transposed.
    """
    check_shapes(
        NAME, {"N": check_cu_seqlens(v, cu_seqlens)},
        v=(v, "B T H V"), q=(q, "B T H K"), k=(k, "B T H K"), a=(a, "B T H K"), b=(b, "B T H K"),
        g=(g, "B T H" if g is not None and g.dim() == 3 else "B T H K"),
        initial_state=(initial_state, "N H K V"), reset=(reset, "B T"),
    )  # fmt: skip
    check_floats(NAME, q=q, k=k, v=v, a=a, b=b, g=g, initial_state=initial_state)
    if reset is not None and reset.dtype != boolean:
        raise KernelError(f"op {NAME!r}: reset has dtype {reset.dtype}", hint="pass a bool tensor")
    return DELTA_RULE(
        q, k, v, a, b, g, initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens, backend=backend
    )


__all__ = ["DELTA_RULE", "delta_rule"]
