"""FAVOR+'s positive features of a causal sequence, with exponents that can neither overflow nor vanish."""

from __future__ import annotations

from torch import Tensor
from torch import bool as boolean

from altx_kernels import Backend, KernelError, Op
from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.gpu import triton_backend
from altx_performer.kernels.positive_features import cases, native, reference, torch
from altx_performer.kernels.positive_features.reference import GONE, LOWEST

Features = tuple[Tensor, Tensor, Tensor, Tensor]

OP: Op[Features] = Op(
    "positive-features",
    reference.positive_features,
    [
        triton_backend("altx_performer.kernels.positive_features", "a b half"),
        Backend("native", native.positive_features, native.unavailable, native.LIBRARY.problem),
        Backend("torch", torch.positive_features),
    ],
    summary="FAVOR+: features of queries and keys, and the decay with which their sums stay in range",
    examples=cases.examples,
    workloads=cases.workloads,
)


def positive_features(
    a: Tensor,
    b: Tensor,
    half: Tensor,
    *,
    M: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> Features:
    """Exponentials of W q and W k - |k|^2 / 2, each counted from the largest that it has seen.

        M_t = max(M_{t-1}, b_t - half_t),    c_t = max_f (a_t + M_t)_f
        q' = exp(a_t + M_t - c_t),    k' = exp(b_t - half_t - M_t),    decay = M_{t-1} - M_t

    A linear recurrence over q', k' and decay has the ratios of sums of exp(a) exp(b - half) without their size. What is
    done with the results must not depend on M and c otherwise: they count as constants, and get no gradient.

    Args:
        a: (B, T, H, F), W q.
        b: (B, T, H, F), W k.
        half: (B, T, H), |k|^2 / 2; infinite where there is no key.
        M: (B, H, F), before the first token; None is `LOWEST`, no key so far.
        reset: (B, T) bool; where it is true, M_{t-1} counts as `LOWEST`.
        backend: pins one.

    Returns:
        q' and k' (B, T, H, F) in the dtype of a; decay, from `GONE` to 0, and the last M (B, H, F), in float32, or
        float64 if an argument is.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Choromanski et al. 2020, arXiv:2009.14794, lemma 1, and section 2.3.
    """
    check_shapes(
        OP.name, {}, a=(a, "B T H F"), b=(b, "B T H F"), half=(half, "B T H"), M=(M, "B H F"), reset=(reset, "B T")
    )
    check_floats(OP.name, a=a, b=b, half=half, M=M)
    if reset is not None and reset.dtype != boolean:
        raise KernelError(f"op {OP.name!r}: reset has dtype {reset.dtype}", hint="pass bool")
    return OP(a, b, half, M=M, reset=reset, backend=backend)


__all__ = ["GONE", "LOWEST", "OP", "positive_features"]
