"""S4D: a diagonal state space for every channel (Gu, Gupta, Goel & Ré 2022, arXiv:2206.11893).

B rows, T tokens, D model width, N complex states, which stand for 2 N real ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.layer import Layer
from altx.masking import RealFirst
from altx.spec import BuildContext
from altx_s4.config import S4DConfig
from altx_s4.discretization import DISCRETIZATIONS
from altx_s4.hippo import clipped, legs
from altx_s4.planes import join, times
from altx_s4.remembered import Remembered
from altx_s4.state_space import GLU, StateSpace, System, both_ways, initial_log_dt, wide


class S4DKernel(nn.Module):
    """Parameters of a diagonal state space, with the names that they have in the authors' code.

    Args:
        dim: D.
        states: N.
        systems: 1, or 2 that share all but C.
        init: how A starts.
        dt_range: smallest and largest step size at the start.
    """

    def __init__(self, dim: int, states: int, systems: int, init: str, dt_range: tuple[float, float]) -> None:
        super().__init__()
        a, b = initial_A(init, states)
        C = torch.randn(systems, dim, 2, states) * 0.5**0.5
        C = times(C, b)
        shape = (dim, states, 2) if systems == 1 else (systems, dim, states, 2)
        self.C = nn.Parameter(C.mT.reshape(shape).contiguous())
        self.log_dt = nn.Parameter(initial_log_dt((dim,), *dt_range))
        self.log_A_real = nn.Parameter((-a[0]).log().repeat(dim, 1))
        self.A_imag = nn.Parameter(a[1].repeat(dim, 1))

    def A(self) -> Tensor:
        """(D, 2, N)."""
        return join(-wide(self.log_A_real).exp(), wide(self.A_imag))


class S4D(StateSpace):
    """The layer of the authors' `s4d.py`.

        h_t = A-bar h_{t-1} + B-bar x_t,    y_t = 2 Re(sum_n C_n h_{t,n}) + D x_t,    out = GLU(W gelu(y) + b)

    A-bar and B-bar are discretised from A and the step size, which each channel has; B is 1 and part of C.

    Args:
        dim: D.
        states: N.
        init: how A starts: "lin", "inv", "real" or "legs".
        discretization: "zoh" or "bilinear".
        dt_range: smallest and largest step size at the start.
        lr: learning rate of A and dt, or None for that of everything else.
        bidirectional: whether a second C reads a system that runs from the end.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int,
        init: str,
        discretization: str,
        dt_range: tuple[float, float],
        lr: float | None,
        bidirectional: bool,
    ) -> None:
        super().__init__((dim, 2, states), bidirectional)
        self.remembered = Remembered[list[System]]()
        self.discretize, self.lr = DISCRETIZATIONS[discretization], lr
        self.D = nn.Parameter(torch.randn(dim))
        self.kernel = S4DKernel(dim, states, 1 + bidirectional, init, dt_range)
        self.output_linear = GLU(dim)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        options = {"weight_decay": 0.0} | ({} if self.lr is None else {"lr": self.lr})
        return {f"kernel.{name}": options for name in ("log_dt", "log_A_real", "A_imag")}

    def systems(self) -> list[System]:
        """The coefficients of the state space, or of both."""
        rate, gain = self.discretize(self.kernel.A(), wide(self.kernel.log_dt).exp()[:, None])
        C = 2 * wide(self.kernel.C).mT.contiguous()
        return [System(rate, times(one, gain)) for one in (C if self.bidirectional else C[None])]

    def sequence(self, batch: RealFirst, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return both_ways(batch, state, self.remembered(self.systems, list(self.kernel.parameters())), self.D)

    def output(self, y: Tensor) -> Tensor:
        out: Tensor = self.output_linear(F.gelu(y))
        return out


def initial_A(init: str, states: int) -> tuple[Tensor, Tensor]:
    """A and B (2, N) as they start in every channel.

    Source: arXiv:2206.11893, section 4: S4D-Lin, S4D-Inv, S4D-Real and S4D-LegS.
    """
    n = torch.arange(states, dtype=torch.float32)
    one = join(torch.ones(states), torch.zeros(states))
    if init == "legs":
        found = legs(2 * states)
        return join(found.a[0], -found.a[1]).float(), join(clipped(found.b)[0], -clipped(found.b)[1]).float()
    if init == "real":
        return join(-(n + 1), torch.zeros(states)), one
    imaginary = math.pi * n if init == "lin" else 2 * states / math.pi * (2 * states / (2 * n + 1) - 1)
    return join(torch.full((states,), -0.5), imaginary), one


def build(config: S4DConfig, ctx: BuildContext) -> Layer:
    return S4D(
        ctx.dim,
        states=config.state_size // 2,
        init=config.init,
        discretization=config.discretization,
        dt_range=(config.dt_min, config.dt_max),
        lr=config.lr,
        bidirectional=config.bidirectional,
    )
