"""S5: one state space with many inputs and outputs, diagonal (Smith, Warrington & Linderman 2023, arXiv:2208.04933).

B rows, T tokens, D model width, P complex states, which stand for 2 P real ones.
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
from altx_s4.config import S5Config
from altx_s4.discretization import DISCRETIZATIONS
from altx_s4.hippo import legs
from altx_s4.kernels.diagonal_ssm import diagonal_ssm
from altx_s4.planes import join
from altx_s4.remembered import Remembered
from altx_s4.state_space import StateSpace, System, backwards, initial_log_dt, wide


class S5(StateSpace):
    """The authors' `S5SSM` and what follows it in their `SequenceLayer`.

        h_t = L-bar h_{t-1} + B-bar x_t,    y_t = 2 Re(C h_t) + D x_t,    out = activation(y)

    Parameters have the names and shapes of the authors' code. L-bar and B-bar are discretised from Lambda, B and the
    step size, which each state has.

    Args:
        dim: D.
        states: P.
        blocks: Lambda starts as the eigenvalues of so many HiPPO matrices.
        C_init: how C starts: "trunc_standard_normal", "lecun_normal" or "complex_normal".
        discretization: "zoh" or "bilinear".
        clip_eigs: whether no real part of Lambda may be above -1e-4.
        activation: "full_glu", "half_glu1", "half_glu2" or "gelu".
        dt_range: smallest and largest step size at the start.
        lr: learning rate of Lambda, B and dt, or None for that of everything else.
        bidirectional: whether a second C reads the states of the same system run from the end.
    """

    C: Tensor
    C1: Tensor
    C2: Tensor
    out1: nn.Linear
    out2: nn.Linear

    def __init__(
        self,
        dim: int,
        *,
        states: int,
        blocks: int,
        C_init: str,
        discretization: str,
        clip_eigs: bool,
        activation: str,
        dt_range: tuple[float, float],
        lr: float | None,
        bidirectional: bool,
    ) -> None:
        super().__init__((states, 2, 1), bidirectional)
        self.discretize, self.clip_eigs = DISCRETIZATIONS[discretization], clip_eigs
        self.activation, self.lr = activation, lr
        self.remembered = Remembered[System]()
        hippo = legs(2 * states // blocks)
        V = torch.block_diag(*[hippo.V] * blocks)  # (2P, P)
        self.Lambda_re = nn.Parameter(hippo.a[0].float().repeat(blocks))
        self.Lambda_im = nn.Parameter(hippo.a[1].float().repeat(blocks))
        B = truncated_normal(2 * states, dim, std=(2 * states) ** -0.5)
        self.B = nn.Parameter(_planes_last(V.conj().T @ B.to(V.dtype)))
        readouts = [self._initial_C(C_init, V, dim) for _ in range(1 + bidirectional)]
        for name, C in zip(("C1", "C2") if bidirectional else ("C",), readouts, strict=True):
            self.register_parameter(name, nn.Parameter(C))
        self.D = nn.Parameter(torch.randn(dim))
        self.log_step = nn.Parameter(initial_log_dt((states, 1), *dt_range))
        for name in {"full_glu": ("out1", "out2"), "gelu": ()}.get(activation, ("out2",)):
            layer = nn.Linear(dim, dim)
            with torch.no_grad():
                layer.weight.copy_(truncated_normal(dim, dim, std=dim**-0.5))
                layer.bias.zero_()
            self.add_module(name, layer)

    def _initial_C(self, C_init: str, V: Tensor, dim: int) -> Tensor:
        """(D, P, 2)."""
        real, states = V.shape
        if C_init == "complex_normal":
            return torch.randn(dim, states, 2) * math.sqrt(0.5)
        C = truncated_normal(dim, real, 2, std=(real * (dim if C_init == "lecun_normal" else 1)) ** -0.5)
        return _planes_last(torch.view_as_complex(C).to(V.dtype) @ V)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        options = {"weight_decay": 0.0} | ({} if self.lr is None else {"lr": self.lr})
        return dict.fromkeys(("Lambda_re", "Lambda_im", "B", "log_step"), options)

    def system(self) -> System:
        """The recurrence: each state is a channel with one state, and B-bar's factor is left for the readout, c."""
        real = wide(self.Lambda_re)
        Lambda = join(real.clamp(max=-1e-4) if self.clip_eigs else real, wide(self.Lambda_im))
        return System(*self.discretize(Lambda.T[..., None], wide(self.log_step).exp()))

    def sequence(self, batch: RealFirst, state: Tensor | None) -> tuple[Tensor, Tensor]:
        system = self.remembered(self.system, [self.Lambda_re, self.Lambda_im, self.log_step])
        u = _driven(batch.x, self.B)
        states, h = diagonal_ssm(u, *system, initial_state=state, reset=batch.reset, lengths=batch.lengths)
        if self.bidirectional:
            y = _read(states, self.C1) + _read(backwards(batch, u, system), self.C2)
        else:
            y = _read(states, self.C)
        return torch.addcmul(y, batch.x, self.D), h

    def output(self, y: Tensor) -> Tensor:
        # The authors' library approximates gelu.
        gelu = F.gelu(y, approximate="tanh")
        if self.activation == "gelu":
            return gelu
        if self.activation == "half_glu2":
            return y * torch.sigmoid(self.out2(gelu))
        left = self.out1(gelu) if self.activation == "full_glu" else gelu
        out: Tensor = left * torch.sigmoid(self.out2(gelu))
        return out


def _driven(x: Tensor, B: Tensor) -> Tensor:
    """B x: (B, T, D), (P, D, 2) to (B, T, 2, P)."""
    if x.shape[1] > 1:
        both: Tensor = F.linear(x, B.permute(2, 0, 1).flatten(0, 1)).unflatten(-1, (2, -1))
        return both
    # For one token B is not worth a copy that has its planes apart: (x, 0) finds the real ones, (0, x) the others.
    none = torch.zeros_like(x)
    pairs = torch.stack([torch.stack([x, none], -1), torch.stack([none, x], -1)], -3)
    return F.linear(pairs.flatten(-2), B.flatten(-2))


def _read(h: Tensor, C: Tensor) -> Tensor:
    """2 Re(C h): (B, T, 2, P), (D, P, 2) to (B, T, D)."""
    re, im = h.unbind(-2)
    return F.linear(torch.stack([2 * re, -2 * im], -1).flatten(-2), C.flatten(-2))


def _planes_last(z: Tensor) -> Tensor:
    """Complex (...) as float32 (..., 2)."""
    return torch.view_as_real(z).float().contiguous()


def truncated_normal(*shape: int, std: float) -> Tensor:
    """Normal numbers cut off at twice what makes `std` their standard deviation."""
    wide = std / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(shape), std=wide, a=-2 * wide, b=2 * wide)


def build(config: S5Config, ctx: BuildContext) -> Layer:
    return S5(
        ctx.dim,
        states=config.state_size // 2,
        blocks=config.blocks,
        C_init=config.C_init,
        discretization=config.discretization,
        clip_eigs=config.clip_eigs,
        activation=config.activation,
        dt_range=(config.dt_min, config.dt_max),
        lr=config.lr,
        bidirectional=config.bidirectional,
    )
