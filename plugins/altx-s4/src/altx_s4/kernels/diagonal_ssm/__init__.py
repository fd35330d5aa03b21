"""A state space with a diagonal, complex transition that does not depend on the token."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import Backend, Op
from altx_kernels.gpu import triton_backend
from altx_s4.kernels.diagonal_ssm import cases, native, reference, torch
from altx_s4.kernels.diagonal_ssm.check import check

OP: Op[tuple[Tensor, Tensor]] = Op(
    "diagonal-ssm",
    reference.diagonal_ssm,
    [
        triton_backend("altx_s4.kernels.diagonal_ssm", "x rate c b w v D", rate=256),
        Backend("native", native.diagonal_ssm, native.unavailable, native.LIBRARY.problem),
        Backend("torch", torch.diagonal_ssm),
    ],
    summary="S4, S4D, S5: complex states that decay and turn, the same at every token",
    examples=cases.examples,
    workloads=cases.workloads,
)


def diagonal_ssm(
    x: Tensor,
    rate: Tensor,
    c: Tensor,
    b: Tensor | None = None,
    w: Tensor | None = None,
    v: Tensor | None = None,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """N complex states for each of H channels, which take in that channel's input and are summed up to its output.

        h_t = (1 + rate) h_{t-1} + b x_t - w Re(sum_n v_n h_{t-1,n}),    y_t = Re(sum_n c_n h_{t,n}) + D x_t

    With a complex x, y is the complex sum. A complex number is given as two planes, its real and its imaginary part.
    The transition comes as its difference from 1, since 1 + rate keeps few digits of a slow decay's rate.

    Args:
        x: (B, T, H), or complex (B, T, 2, H).
        rate: (H, 2, N).
        c: (H, 2, N).
        b, w, v: (H, 2, N), for a transition with a low-rank part; not with a complex x. Without them, b is 1 and w 0.
        D: (H,), the skip; not with a complex x.
        initial_state: (B, H, 2, N), h before the first token; zero if None.
        reset: (B, T) bool; where it is true, h_{t-1} counts as zero.
        lengths: (B,) int; tokens of a row after so many leave h as it is, and their y is zero.
        backend: pins a backend by name.

    Returns:
        y like x, and the last h (B, H, 2, N) in float32, or float64 if an argument is.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Gu et al. 2022, arXiv:2206.11893, equation 2, and arXiv:2111.00396, appendix C.2.
    """
    check(OP.name, x, rate, c, b, w, v, D, initial_state, reset, lengths)
    return OP(
        x, rate, c, b, w, v, D, initial_state=initial_state, reset=reset, lengths=lengths, backend=backend
    )  # fmt: skip


__all__ = ["OP", "diagonal_ssm"]
