"""Mamba-2: a state space with one decay per head, behind a short convolution (Dao & Gu 2024, arXiv:2405.21060).

B rows, T tokens, E inner width, H heads of width P, G groups of heads, N state size, K width of the convolution.
"""

from __future__ import annotations

import math
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
from altx_kernels.causal_conv1d import causal_conv1d
from altx_mamba.gated_norm import GatedRMSNorm
from altx_mamba.initial import initial_dt_bias, zero_biases
from altx_mamba.kernels.mamba2_step import mamba2_step
from altx_mamba.kernels.ssd import ssd
from altx_mamba.mamba2_config import Mamba2Config
from altx_mamba.stepping import counter, steps, weight_and_eps

LEAVES = {"conv": Leaf(kind="conv"), "ssm": Leaf(fp32=True)}


class Mamba2(Layer):
    """The block of figure 6 (right) without its first norm and its residual.

        [z | u | dt] = W_in x,    [v | B | C] = silu(conv(u)),    dt = softplus(dt + b_dt)
        h_t = exp(dt_t A) h_{t-1} + B_t (dt_t v_t)^T,    y = W_out norm((C h + D v) * silu(z))

    Parameters have the names and shapes of the authors' code, so their checkpoints fit.

    Args:
        dim: model width.
        inner: E.
        head_dim: P.
        state_size: N.
        groups: G.
        conv_kernel: K.
        A_range: smallest and largest -A at the start.
        dt_range: smallest and largest step size at the start.
        dt_floor: no step size starts below this.
        dt_limit: what step sizes are clamped to; an upper None is no limit.
        norm_eps: epsilon of the gated norm.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections in and out have biases.
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
        conv_kernel: int,
        A_range: tuple[float, float],
        dt_range: tuple[float, float],
        dt_floor: float,
        dt_limit: tuple[float, float | None],
        norm_eps: float,
        conv_bias: bool,
        bias: bool,
        out_scale: float,
    ) -> None:
        super().__init__()
        heads, shared = inner // head_dim, groups * state_size
        self.head_dim, self.state_size, self.dt_limit, self.norm_eps = head_dim, state_size, dt_limit, norm_eps
        self.projected = [inner, inner + 2 * shared, heads]
        self.convolved = [inner, shared, shared]
        self.in_proj = nn.Linear(dim, sum(self.projected), bias=bias)
        channels = sum(self.convolved)
        self.conv1d = nn.Conv1d(channels, channels, conv_kernel, groups=channels, bias=conv_bias)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads, *dt_range, dt_floor))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_range).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, group_size=inner // groups, eps=norm_eps)
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        zero_biases(self.in_proj, self.out_proj)
        with torch.no_grad():
            self.out_proj.weight.mul_(out_scale)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        return {name: {"weight_decay": 0.0} for name in ("A_log", "D", "dt_bias")}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        weight = self.conv1d.weight
        ssm = len(self.D), self.state_size, self.head_dim
        shapes = {"conv": (weight.shape[2] - 1, weight.shape[0]), "ssm": ssm}
        return State.zeros(batch, shapes, LEAVES, weight, device, dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if not x.shape[1]:
            return Output(x, state)
        if out := in_pieces(self, x, ctx, state):
            return out
        if state is not None and steps(self, x, ctx, state):
            return self._step(x, ctx, state)
        batch = real_first(x, ctx)
        z, u, dt = self.in_proj(batch.x).split(self.projected, -1)
        past, h = (state["conv"], state["ssm"]) if state else (None, None)
        u, past = causal_conv1d(
            u, self.conv1d.weight[:, 0], self.conv1d.bias,
            initial_state=past, reset=batch.reset, lengths=batch.lengths, activation=True,
        )  # fmt: skip
        v, B, C = u.split(self.convolved, -1)
        v, B, C = v.unflatten(-1, (-1, self.head_dim)), *(p.unflatten(-1, (-1, self.state_size)) for p in (B, C))
        dt = self._steps(dt)
        if batch.mask is not None:
            dt = dt.masked_fill(~batch.mask[..., None], 0)  # holds the state exactly
        A = -torch.exp(self.A_log.to(dt.dtype))
        y, h = ssd(v, dt, A, B, C, self.D, initial_state=h, reset=batch.reset)
        y = self.out_proj(self.norm(y.flatten(2), z))
        if state is not None:
            state = state.replace(conv=past, ssm=h, seen=advanced(state.seen, x, ctx))
        return Output(batch.restore(y), state)

    def residual(self, x: Tensor, norm: nn.Module, ctx: Context, state: State | None) -> Output | None:
        return self._step(x, ctx, state, norm) if state is not None and steps(self, x, ctx, state, norm) else None

    def _step(self, x: Tensor, ctx: Context, state: State, norm: nn.Module | None = None) -> Output:
        """One token of every row: decoding; with the norm before and the residual around it if a norm is given."""
        pre_weight, pre_eps = weight_and_eps(norm)
        seen = counter(state, ctx)
        # Straight from where nn.Module keeps them: its attributes are slow, and a step is short.
        weights: list[Any] = [child._parameters.values() for child in self._modules.values() if child is not None]
        (W_in, b_in), (W_conv, b_conv), (W_norm,), (W_out, b_out) = weights
        dt_bias, A_log, D = self._parameters.values()
        y, past, h = mamba2_step(
            x, state["conv"], state["ssm"], W_in, b_in, W_conv, b_conv, dt_bias, A_log, D, W_norm, W_out,
            b_out, norm_eps=self.norm_eps, dt_limit=self.dt_limit, donate=ctx.donate_state, pre_weight=pre_weight,
            pre_eps=pre_eps, seen=seen,
        )  # fmt: skip
        return Output(y, State({"conv": past, "ssm": h}, LEAVES, seen=seen))

    def _steps(self, dt: Tensor) -> Tensor:
        """Step sizes (B, T, H) in float32 or more, from their projection."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        least, most = self.dt_limit
        return dt if (least, most) == (0.0, None) else dt.clamp(least, math.inf if most is None else most)


def build(config: Mamba2Config, ctx: BuildContext) -> Layer:
    return Mamba2(
        ctx.dim,
        inner=config.expand * ctx.dim,
        head_dim=config.head_dim,
        state_size=config.state_size,
        groups=config.n_groups,
        conv_kernel=config.conv_kernel,
        A_range=(config.A_min, config.A_max),
        dt_range=(config.dt_min, config.dt_max),
        dt_floor=config.dt_init_floor,
        dt_limit=(config.dt_lower, config.dt_upper),
        norm_eps=config.norm_eps,
        conv_bias=config.conv_bias,
        bias=config.bias,
        out_scale=ctx.num_layers**-0.5 if config.rescale_out_proj else 1.0,
    )
