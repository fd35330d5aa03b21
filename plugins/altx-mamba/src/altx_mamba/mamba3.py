"""Mamba-3: a rotating state, discretised by a trapezoid, without a convolution (Lahoti et al. 2026, arXiv:2603.15569).

B rows, T tokens, E inner width, H heads of width P, G groups of heads, N state size, R angles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.masking import real_first
from altx.pieces import in_pieces
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_mamba.gated_norm import GatedRMSNorm
from altx_mamba.initial import initial_dt_bias
from altx_mamba.kernels.mamba3 import mamba3
from altx_mamba.kernels.mamba3_step import mamba3_step
from altx_mamba.mamba3_config import Mamba3Config
from altx_mamba.stepping import counter, steps, weight_and_eps

LEAVES = {name: Leaf(fp32=True) for name in ("ssm", "angle", "k", "v")}


class Mamba3(Layer):
    """The mixer of the paper with one input and one output per head (SISO), without its norm and residual.

        [z | x | B | C | dt | a | l | theta] = W_in u,    dt = softplus(dt + b_dt),    A = -max(softplus(a), A_floor)
        k = R(angle) (norm(B) + b_B),    q = R(angle) (norm(C) + b_C),    angle_t = angle_{t-1} + dt_t pi tanh(theta_t)
        h_t = e^{dt A} h_{t-1} + (1 - sigmoid(l)) dt e^{dt A} k_{t-1} x_{t-1}^T + sigmoid(l) dt k_t x_t^T
        y = W_out ((h^T q + D x) * silu(z))

    Parameters have the names and shapes of the authors' code, so their checkpoints fit.

    Args:
        dim: model width.
        inner: E.
        head_dim: P.
        state_size: N.
        groups: G.
        angles: R.
        heavy_tail: whether -A is 1 + a for positive a and 1 / (1 - a) for others, instead of softplus(a).
        A_floor: smallest -A.
        dt_range: smallest and largest step size at the start.
        dt_floor: no step size starts below this.
        out_norm: whether each head's output is normed before the gate.
        norm_eps: epsilon of all norms.
        out_scale: factor on the first weights of W_out.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: int,
        head_dim: int,
        state_size: int,
        groups: int,
        angles: int,
        heavy_tail: bool,
        A_floor: float,
        dt_range: tuple[float, float],
        dt_floor: float,
        out_norm: bool,
        norm_eps: float,
        out_scale: float,
    ) -> None:
        super().__init__()
        heads = inner // head_dim
        self.head_dim, self.groups, self.heavy_tail = head_dim, groups, heavy_tail
        self.A_floor, self.norm_eps = A_floor, norm_eps
        self.projected = [inner, inner, groups * state_size, groups * state_size, heads, heads, heads, angles]
        self.in_proj = nn.Linear(dim, sum(self.projected), bias=False)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads, *dt_range, dt_floor))
        # The axis of length 1 is where the authors' code has its inputs per head.
        self.B_bias = nn.Parameter(torch.ones(heads, 1, state_size))
        self.C_bias = nn.Parameter(torch.ones(heads, 1, state_size))
        self.B_norm = GatedRMSNorm(state_size, group_size=state_size, eps=norm_eps)
        self.C_norm = GatedRMSNorm(state_size, group_size=state_size, eps=norm_eps)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, group_size=head_dim, eps=norm_eps, gate_first=False) if out_norm else None
        self.out_proj = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight.mul_(out_scale)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        return {name: {"weight_decay": 0.0} for name in ("D", "dt_bias", "B_bias", "C_bias")}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        heads, _, size = self.B_bias.shape
        shapes = {
            "ssm": (heads, size, self.head_dim), "angle": (heads, self.projected[-1]), "k": (heads, size),
            "v": (heads, self.head_dim),
        }  # fmt: skip
        return State.zeros(batch, shapes, LEAVES, self.D, device, dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if not x.shape[1]:
            return Output(x, state)
        if out := in_pieces(self, x, ctx, state):
            return out
        if state is not None and steps(self, x, ctx, state):
            return self._step(x, ctx, state)
        batch = real_first(x, ctx)
        z, v, B, C, dt, a, trap, angles = self.in_proj(batch.x).split(self.projected, -1)
        h, angle, k, last = (state["ssm"], state["angle"], state["k"], state["v"]) if state else (None,) * 4
        y, h, angle, k, last = mamba3(
            v.unflatten(-1, (-1, self.head_dim)), self._steps(dt), self._decay(a),
            self.B_norm(B.unflatten(-1, (self.groups, -1))), self.C_norm(C.unflatten(-1, (self.groups, -1))),
            trap, angles, self.B_bias[:, 0], self.C_bias[:, 0], self.D,
            initial_state=h, initial_angle=angle, initial_k=k, initial_v=last,
            reset=batch.reset, lengths=batch.lengths,
        )  # fmt: skip
        y = y.flatten(2)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        if state is not None:
            state = state.replace(ssm=h, angle=angle, k=k, v=last, seen=advanced(state.seen, x, ctx))
        return Output(batch.restore(self.out_proj(y)), state)

    def residual(self, x: Tensor, norm: nn.Module, ctx: Context, state: State | None) -> Output | None:
        return self._step(x, ctx, state, norm) if state is not None and steps(self, x, ctx, state, norm) else None

    def _step(self, x: Tensor, ctx: Context, state: State, norm: nn.Module | None = None) -> Output:
        """One token of every row: decoding; with the norm before and the residual around it if a norm is given."""
        pre_weight, pre_eps = weight_and_eps(norm)
        seen = counter(state, ctx)
        # Straight from where nn.Module keeps them: its attributes are slow, and a step is short.
        weights: dict[str, Any] = {name: m._parameters["weight"] for name, m in self._modules.items() if m is not None}
        own: Any = self._parameters.values()
        dt_bias, B_bias, C_bias, D = own
        y, h, angle, k, v = mamba3_step(
            x, state["ssm"], state["angle"], state["k"], state["v"], weights["in_proj"], dt_bias,
            weights["B_norm"], weights["C_norm"], B_bias.squeeze(1), C_bias.squeeze(1), D, weights.get("norm"),
            weights["out_proj"], norm_eps=self.norm_eps, A_floor=self.A_floor, heavy_tail=self.heavy_tail,
            donate=ctx.donate_state, pre_weight=pre_weight,
            pre_eps=pre_eps, seen=seen,
        )  # fmt: skip
        state = state.replace(ssm=h, angle=angle, k=k, v=v, seen=seen)
        return Output(y, state)

    def _steps(self, dt: Tensor) -> Tensor:
        """Step sizes (B, T, H) in float32 or more, from their projection."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        return F.softplus(dt.to(wide) + self.dt_bias.to(wide))

    def _decay(self, a: Tensor) -> Tensor:
        """A (B, T, H) in float32 or more, from its projection."""
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        rate = a.clamp(min=0) + torch.reciprocal(1 - a.clamp(max=0)) if self.heavy_tail else F.softplus(a)
        return -rate.clamp(min=self.A_floor)


def build(config: Mamba3Config, ctx: BuildContext) -> Layer:
    return Mamba3(
        ctx.dim,
        inner=config.expand * ctx.dim,
        head_dim=config.head_dim,
        state_size=config.state_size,
        groups=config.n_groups,
        angles=config.angles,
        heavy_tail=config.decay == "heavy-tail",
        A_floor=config.A_floor,
        dt_range=(config.dt_min, config.dt_max),
        dt_floor=config.dt_init_floor,
        out_norm=config.out_norm,
        norm_eps=config.norm_eps,
        out_scale=ctx.num_layers**-0.5 if config.rescale_out_proj else 1.0,
    )
