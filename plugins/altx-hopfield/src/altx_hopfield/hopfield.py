"""Modern Hopfield network over learned patterns (Ramsauer et al. 2020, arXiv:2008.02217).

Names and layout of the parameters are those of `HopfieldLayer` in github.com/ml-jku/hopfield-layers, without the
prefixes `hopfield.` and `association_core.`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH
from altx.memory import Memory, Read, Scan
from altx.spec import BuildContext
from altx.state import State
from altx_hopfield.config import HopfieldConfig, capabilities


class Hopfield(Memory):
    """N patterns that training stores, and of which each token retrieves.

        q = W_Q norm(x),  K = W_K norm(patterns),  V = W_V norm(patterns or values)
        q <- softmax(beta q K^T) K                     section 2, equation (3); all updates but the last
        y = W_O softmax(beta q K^T) V                  section 3, equation (10)

    Args:
        config: sizes, temperature, updates.
        dim: model width D.

    Shape: x (B, T, D) to a read value (B, T, D).
    """

    def __init__(self, config: HopfieldConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        inner = config.heads * config.width(dim)
        self.lookup_weights = nn.Parameter(torch.empty(1, config.patterns, dim))
        self.target_weights = nn.Parameter(torch.empty(1, config.patterns, dim)) if config.separate_values else None
        self.norm_stored_pattern = nn.LayerNorm(dim)
        self.norm_state_pattern = nn.LayerNorm(dim)
        self.norm_pattern_projection = nn.LayerNorm(dim)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner)) if config.bias else None
        self.out_proj = nn.Linear(inner, dim, bias=config.bias)
        for weight in (self.lookup_weights, self.target_weights, self.in_proj_weight, self.out_proj.weight):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)
        if config.bias:
            nn.init.zeros_(self.out_proj.bias)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        return State()

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        return Read(self.retrieve(q)), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        return state, {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """All tokens at once: none sees another."""
        return Scan(Read(self.retrieve(x)), state)

    def retrieve(self, x: Tensor) -> Tensor:
        """What the tokens x (B, T, D) retrieve, (B, T, D)."""
        if not x.numel():
            return x
        q, k, v = self._projected(x)
        beta = self.config.beta
        for _ in range(self.config.updates - 1):
            q = F.scaled_dot_product_attention(q, k, k, scale=beta)
        y: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v, scale=beta)[0].transpose(0, 1).flatten(1))
        return y.to(x.dtype).view(x.shape)

    def _projected(self, x: Tensor) -> list[Tensor]:
        """Queries (1, H, B T, d), all tokens as one sequence to the patterns; keys and values (1, H, N, d)."""
        patterns = self.lookup_weights[0]
        targets = patterns if self.target_weights is None else self.target_weights[0]
        inputs = (
            self.norm_state_pattern(x.flatten(0, 1)),
            self.norm_stored_pattern(patterns),
            self.norm_pattern_projection(targets),
        )
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(rows, weight, bias).unflatten(-1, (self.config.heads, -1)).transpose(0, 1)[None]
            for rows, weight, bias in zip(inputs, weights, biases, strict=True)
        ]


def build(config: HopfieldConfig, ctx: BuildContext) -> Hopfield:
    return Hopfield(config, ctx.dim)
