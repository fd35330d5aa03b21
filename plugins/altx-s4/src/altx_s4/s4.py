"""S4: for every channel a state space that is diagonal plus low-rank (Gu, Goel & Ré 2022, arXiv:2111.00396).

B rows, T tokens, D model width, N complex states, which stand for 2 N real ones, S copies of A, B and P.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.layer import Layer
from altx.masking import RealFirst
from altx.spec import BuildContext
from altx_s4.checkpoint import untruncate
from altx_s4.config import S4Config
from altx_s4.discretization import halfway
from altx_s4.hippo import clipped, legs
from altx_s4.planes import conjugate, join, times
from altx_s4.remembered import Remembered
from altx_s4.state_space import GLU, StateSpace, System, both_ways, initial_log_dt, wide


class DPLRKernel(nn.Module):
    """Parameters of a state space h' = (diag(A) - P P^*) h + B u, with the names that they have in the authors' code.

    Args:
        dim: D.
        states: N.
        copies: S.
        systems: 1, or 2 that share all but C.
        dt_range: smallest and largest step size at the start.
    """

    def __init__(self, dim: int, states: int, copies: int, systems: int, dt_range: tuple[float, float]) -> None:
        super().__init__()
        hippo = legs(2 * states)

        def vectors(z: Tensor) -> nn.Parameter:
            return nn.Parameter(z.float().mT.repeat(1, copies, 1, 1))

        self.C = nn.Parameter(torch.randn(systems, dim, states, 2) * 0.5**0.5)
        self.inv_dt = nn.Parameter(initial_log_dt((dim, 1), *dt_range))
        self.B, self.P = vectors(clipped(hippo.b)), vectors(hippo.p)
        self.A_real = nn.Parameter((-hippo.a[0]).clamp(min=1e-4).log().float().repeat(copies, 1))
        self.A_imag = nn.Parameter((-hippo.a[1]).clamp(min=1e-4).float().repeat(copies, 1))
        self.register_load_state_dict_pre_hook(untruncate)  # type: ignore[no-untyped-call]

    def A(self) -> Tensor:
        """The diagonal part (S, 2, N)."""
        return join(-wide(self.A_real).exp(), -wide(self.A_imag))

    def systems(self) -> list[System]:
        """The coefficients of the state space, or of both."""
        rate, b, w, v = self.system()
        return [System(rate, c, b, w, v) for c in (2 * wide(self.C).mT).contiguous()]

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Coefficients of the discrete state space (D, 2, N): `rate`, `b`, `w` and `v` of `diagonal_ssm`.

        The bilinear transform of A = L - P P^* is A-bar = 2 (1 - dt A / 2)^-1 - 1. With M = (1 - dt L / 2)^-1, the
        Woodbury identity makes it (2 M - 1) - k M P P^* M, k = dt / (1 + dt P^* M P / 2): diagonal and of rank 1 again.
        A sum over states and their conjugates is twice the real part of that over states.

        Source: arXiv:2111.00396, equation 3 and appendix C.2.
        """
        A, B, P = self.A(), wide(self.B[0]).mT.contiguous(), wide(self.P[0]).mT.contiguous()
        if len(A) < len(self.inv_dt):
            A, B, P = (z.repeat(len(self.inv_dt) // len(z), 1, 1) for z in (A, B, P))
        dt = wide(self.inv_dt).exp()[:, None]
        M = halfway(A, dt)
        v = 2 * times(conjugate(P), M)
        w = times(M, P) * (dt / (1 + dt / 2 * inner(v, P)))
        return times(A * dt, M), dt * times(M, B) - dt / 2 * inner(v, B) * w, w, v


class Convolution(nn.Module):
    """The state space and its skip, under the name `layer` of the authors' block."""

    def __init__(self, kernel: DPLRKernel, dim: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.randn(1, dim))
        self.kernel = kernel


class S4(StateSpace):
    """The authors' `S4Block` with the kernel "dplr".

        h_t = A-bar h_{t-1} + B-bar x_t,    y_t = 2 Re(sum_n C_n h_{t,n}) + D x_t,    out = GLU(W gelu(y) + b)

    A-bar and B-bar are the bilinear discretisation of HiPPO-LegS in each channel, or what training makes of it.

    Args:
        dim: D.
        states: N.
        copies: S, how many A, B and P there are; channel d has number d mod S.
        dt_range: smallest and largest step size at the start.
        lr: learning rate of A, B, P and dt, or None for that of everything else.
        bidirectional: whether a second C reads a system that runs from the end.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int,
        copies: int,
        dt_range: tuple[float, float],
        lr: float | None,
        bidirectional: bool,
    ) -> None:
        super().__init__((dim, 2, states), bidirectional)
        self.lr, self.remembered = lr, Remembered[list[System]]()
        self.layer = Convolution(DPLRKernel(dim, states, copies, 1 + bidirectional, dt_range), dim)
        self.output_linear = GLU(dim)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        options = {"weight_decay": 0.0} | ({} if self.lr is None else {"lr": self.lr})
        return {f"layer.kernel.{name}": options for name in ("inv_dt", "A_real", "A_imag", "B", "P")}

    def sequence(self, batch: RealFirst, state: Tensor | None) -> tuple[Tensor, Tensor]:
        kernel = self.layer.kernel
        systems = self.remembered(kernel.systems, list(kernel.parameters()))
        return both_ways(batch, state, systems, self.layer.D[0])

    def output(self, y: Tensor) -> Tensor:
        out: Tensor = self.output_linear(F.gelu(y))
        return out


def inner(v: Tensor, z: Tensor) -> Tensor:
    """Re(sum_n v_n z_n): (..., 2, N) to (..., 1, 1)."""
    (vr, vi), (zr, zi) = v.unbind(-2), z.unbind(-2)
    return (vr * zr - vi * zi).sum(-1)[..., None, None]


def build(config: S4Config, ctx: BuildContext) -> Layer:
    return S4(
        ctx.dim,
        states=config.state_size // 2,
        copies=config.n_ssm or ctx.dim,
        dt_range=(config.dt_min, config.dt_max),
        lr=config.lr,
        bidirectional=config.bidirectional,
    )
