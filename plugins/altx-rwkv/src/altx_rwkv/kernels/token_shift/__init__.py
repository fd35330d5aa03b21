"""The token shift of RWKV."""

from __future__ import annotations

from torch import Tensor
from torch import bool as boolean

from altx_kernels import Backend, KernelError, Op
from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.gpu import triton_backend
from altx_rwkv.kernels.token_shift import cases, native, reference

OP: Op[Tensor] = Op(
    "token-shift",
    reference.token_shift,
    [
        triton_backend("altx_rwkv.kernels.token_shift", "x mix initial_state"),
        Backend("native", native.token_shift, native.unavailable, native.LIBRARY.problem),
    ],
    summary="RWKV: several mixtures of each token with the one before",
    examples=cases.examples,
    workloads=cases.workloads,
)


def token_shift(
    x: Tensor,
    mix: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mixtures of each token with the one before: x_t + mix_n (x_{t-1} - x_t).

    Args:
        x: (B, T, D).
        mix: (N, D), how much of the token before goes into each mixture.
        initial_state: (B, D), the token before the first; zeros if None.
        reset: (B, T) bool; where it is true, the token before counts as zeros.
        backend: pins a backend by name.

    Returns:
        (N, B, T, D) in the dtype of x.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, equation 11.
    """
    check_shapes(
        OP.name, {}, x=(x, "B T D"), mix=(mix, "N D"), initial_state=(initial_state, "B D"), reset=(reset, "B T")
    )
    check_floats(OP.name, x=x, mix=mix, initial_state=initial_state)
    if reset is not None and reset.dtype != boolean:
        raise KernelError(f"op {OP.name!r}: reset has dtype {reset.dtype}", hint="pass bool")
    return OP(x, mix, initial_state=initial_state, reset=reset, backend=backend)


__all__ = ["OP", "token_shift"]
