"""The two feed-forward layers every model family needs, alone and as a bank of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.feed_forward_config import TOKENWISE, MLPConfig, SwiGLUConfig
from altx.grouped import grouped_swiglu
from altx.layer import FRESH, Layer, Output
from altx.routed import TargetBank
from altx.spec import BuildContext
from altx.state import State

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}


class SwiGLU(Layer):
    """y = W_down(silu(W_gate x) * W_up x); Shazeer 2020, "GLU Variants Improve Transformer", equation 6."""

    capabilities = TOKENWISE

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        return Output(self.down(F.silu(self.gate(x)) * self.up(x)))


class MLP(Layer):
    """y = W_down(f(W_up x))."""

    capabilities = TOKENWISE

    def __init__(self, dim: int, hidden: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        return Output(self.down(ACTIVATIONS[self.activation](self.up(x))))


class SwiGLUBank(TargetBank):
    """n SwiGLU experts with stacked weights; the same function as n of `SwiGLU`.

    Shapes: gate, up (n, D, F); down (n, F, D).
    """

    capabilities = TOKENWISE

    def __init__(self, n: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.n = n
        self.gate = nn.Parameter(torch.empty(n, dim, hidden))
        self.up = nn.Parameter(torch.empty(n, dim, hidden))
        self.down = nn.Parameter(torch.empty(n, hidden, dim))
        for weight in (self.gate, self.up, self.down):
            # As nn.Linear: uniform within 1 / sqrt(fan_in).
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return grouped_swiglu(x, self.gate, self.up, self.down, offsets)


def build_swiglu(config: SwiGLUConfig, ctx: BuildContext) -> Layer:
    return SwiGLU(ctx.dim, config.width(ctx.dim))


def build_swiglu_bank(config: SwiGLUConfig, ctx: BuildContext) -> TargetBank:
    return SwiGLUBank(ctx.num_targets, ctx.dim, config.width(ctx.dim))


def build_mlp(config: MLPConfig, ctx: BuildContext) -> Layer:
    return MLP(ctx.dim, config.width(ctx.dim), config.activation, config.bias)
