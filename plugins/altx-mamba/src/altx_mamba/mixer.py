"""Mamba-1: a gated selective state-space layer (Gu & Dao 2023, arXiv:2312.00752).

B rows, T tokens, E inner width, N state size, K width of the convolution, R rank of the step size.
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
from altx_kernels.causal_conv1d import causal_conv1d
from altx_mamba.config import MambaConfig
from altx_mamba.initial import initial_dt_bias, zero_biases
from altx_mamba.kernels.mamba_step import mamba_step
from altx_mamba.kernels.selective_scan import selective_scan
from altx_mamba.stepping import counter, steps, weight_and_eps

LEAVES = {"conv": Leaf(kind="conv"), "ssm": Leaf(fp32=True)}


class Mamba(Layer):
    """The block of figure 3 without its norm and residual, computed by Algorithm 2.

        [u | z] = W_in x,    v = silu(conv(u)),    [dt | B | C] = W_x v,    dt = softplus(W_dt dt + b_dt)
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t v_t,    y = W_out ((C h + D v) * silu(z))

    Parameters have the names and shapes of the authors' code, so their checkpoints fit.

    Args:
        dim: model width.
        inner: E.
        state_size: N.
        conv_kernel: K.
        dt_rank: R.
        dt_range: smallest and largest step size at the start.
        dt_floor: no step size starts below this.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections in and out have biases.
        inner_norm_eps: epsilon of a weightless RMSNorm on dt, B and C (Zuo et al. 2024, "Falcon Mamba",
            arXiv:2410.05355), or None for no norm.
        out_scale: factor on the first weights of W_out.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: int,
        state_size: int,
        conv_kernel: int,
        dt_rank: int,
        dt_range: tuple[float, float],
        dt_floor: float,
        conv_bias: bool,
        bias: bool,
        inner_norm_eps: float | None,
        out_scale: float,
    ) -> None:
        super().__init__()
        self.sizes = [dt_rank, state_size, state_size]
        self.inner_norm_eps = inner_norm_eps
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner, bias=conv_bias)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        # S4D-real (section 3.6): A is -1, -2, ... -N in every channel.
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self._initialise(*dt_range, dt_floor, out_scale)

    @torch.no_grad()
    def _initialise(self, dt_min: float, dt_max: float, dt_floor: float, out_scale: float) -> None:
        """As in the authors' code, where it departs from torch."""
        nn.init.uniform_(self.dt_proj.weight, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
        self.dt_proj.bias.copy_(initial_dt_bias(len(self.dt_proj.bias), dt_min, dt_max, dt_floor))
        self.out_proj.weight.mul_(out_scale)
        zero_biases(self.in_proj, self.out_proj)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        return {name: {"weight_decay": 0.0} for name in ("A_log", "D", "dt_proj.bias")}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        weight = self.conv1d.weight
        shapes = {"conv": (weight.shape[2] - 1, weight.shape[0]), "ssm": self.A_log.shape}
        return State.zeros(batch, shapes, LEAVES, weight, device, dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if not x.shape[1]:
            return Output(x, state)
        if out := in_pieces(self, x, ctx, state):
            return out
        if state is not None and steps(self, x, ctx, state):
            return self._step(x, ctx, state)
        batch = real_first(x, ctx)
        u, z = self.in_proj(batch.x).chunk(2, -1)
        past, h = (state["conv"], state["ssm"]) if state else (None, None)
        v, past = causal_conv1d(
            u, self.conv1d.weight[:, 0], self.conv1d.bias,
            initial_state=past, reset=batch.reset, lengths=batch.lengths, activation=True,
        )  # fmt: skip
        dt, B, C = self._select(v)
        if batch.mask is not None:
            dt = dt.masked_fill(~batch.mask[..., None], -torch.inf)  # holds the state exactly
        A = -torch.exp(self.A_log.to(_wide(x.dtype)))
        y, h = selective_scan(
            v, dt, A, B, C, self.D, z, self.dt_proj.bias, softplus=True, initial_state=h, reset=batch.reset
        )
        y = self.out_proj(y)
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
        (W_in, b_in), (W_conv, b_conv), (W_x, _), (W_dt, b_dt), (W_out, b_out) = weights
        A_log, D = self._parameters.values()
        y, past, h = mamba_step(
            x, state["conv"], state["ssm"], W_in, b_in, W_conv, b_conv, W_x, W_dt, b_dt, A_log, D, W_out,
            b_out, inner_norm_eps=self.inner_norm_eps, donate=ctx.donate_state, pre_weight=pre_weight,
            pre_eps=pre_eps, seen=seen,
        )  # fmt: skip
        return Output(y, State({"conv": past, "ssm": h}, LEAVES, seen=seen))

    def _select(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step size before its bias and softplus (B, T, E), B and C (B, T, N) of each token, from v (B, T, E)."""
        dt, B, C = self.x_proj(v).split(self.sizes, -1)
        if self.inner_norm_eps is not None:
            dt, B, C = (F.rms_norm(part, part.shape[-1:], eps=self.inner_norm_eps) for part in (dt, B, C))
        return F.linear(dt, self.dt_proj.weight), B, C


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states and step sizes are kept: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def build(config: MambaConfig, ctx: BuildContext) -> Layer:
    return Mamba(
        ctx.dim,
        inner=config.expand * ctx.dim,
        state_size=config.state_size,
        conv_kernel=config.conv_kernel,
        dt_rank=config.rank(ctx.dim),
        dt_range=(config.dt_min, config.dt_max),
        dt_floor=config.dt_init_floor,
        conv_bias=config.conv_bias,
        bias=config.bias,
        inner_norm_eps=config.inner_norm_eps,
        out_scale=ctx.num_layers**-0.5 if config.rescale_out_proj else 1.0,
    )
