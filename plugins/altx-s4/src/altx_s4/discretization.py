"""From a continuous, diagonal state space h' = A h + B u to h_t = (1 + rate) h_{t-1} + gain B u_t."""

from __future__ import annotations

from torch import Tensor

from altx_s4.planes import expm1, inverse, join, times


def zoh(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: rate and gain (..., 2, N) for A (..., 2, N) and dt (..., 1 or N). u is constant over a step.

    Source: Gu et al. 2022, arXiv:2206.11893, equation 3.
    """
    rate = expm1(A * dt[..., None, :])
    return rate, times(rate, inverse(A))


def bilinear(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The bilinear transform: rate and gain (..., 2, N), as `zoh`.

    Source: Gu et al. 2022, arXiv:2111.00396, equation 3.
    """
    dt = dt[..., None, :]
    inner = halfway(A, dt)
    return times(A * dt, inner), inner * dt


def halfway(A: Tensor, dt: Tensor) -> Tensor:
    """1 / (1 - A dt / 2): (..., 2, N), for A (..., 2, N) and dt (..., 1, 1 or N)."""
    real, imaginary = (A * dt / 2).unbind(-2)
    return inverse(join(1 - real, -imaginary))


DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}
