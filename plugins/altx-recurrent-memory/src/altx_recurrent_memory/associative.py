"""The memory of the Associative Recurrent Memory Transformer (Rodkin et al. 2024, arXiv:2407.04841)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH
from altx.memory import Memory, Read
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_kernels.autocast import no_autocast
from altx_recurrent_memory.config import AssociativeConfig, associative_capabilities

KEPT = Leaf(kind="memory", fp32=True)
EPS = 1e-5
"""Added to every divisor, as in the authors' code."""


class Association(nn.Module):
    """Of one block: a matrix that the memory tokens behind a segment write, and all tokens of later segments read.

        x_t <- x_t + A phi(W_q x_t) / (z . phi(W_q x_t))                                before the block
        A <- A + sum_i beta_i phi(k_i) (v_i - A phi(k_i) / (z . phi(k_i)))^T            after it, k, v of memory tokens
        z <- z + sum_i gamma_i phi(k_i),    gamma_i = 1 - z . phi(k_i) / |phi(k_i)|^2 in [0, 1], no gradient; 1 at first

    Args:
        config: sizes.
        dim: model width D.
    """

    def __init__(self, config: AssociativeConfig, dim: int) -> None:
        super().__init__()
        self.order, self.correction = config.order, config.correction
        self.q_proj = nn.Linear(dim, config.key_dim, bias=False)
        self.k_proj = nn.Linear(dim, config.key_dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.rate_proj = nn.Linear(dim, 1)
        # As the authors do: at first the memory is silent.
        nn.init.zeros_(self.v_proj.weight)

    def features(self, x: Tensor) -> Tensor:
        """DPFP (Schlag et al. 2021, arXiv:2102.11174, equation 37): (..., d) to (..., 2 d order), none negative."""
        both = torch.cat([F.relu(x), F.relu(-x)], -1)
        return torch.cat([both * both.roll(shift, -1) for shift in range(1, self.order + 1)], -1)

    def recalled(self, keys: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """What is held for features (B, T, K): (B, T, D), and their share of z with EPS (B, T, 1)."""
        weight = (keys @ state["norm"][..., None]) + EPS
        return keys @ state["matrix"] / weight, weight

    def read(self, x: Tensor, state: State) -> Tensor:
        """What is added to x (B, T, D)."""
        q = self.q_proj(x).to(state["norm"].dtype)
        with no_autocast(x.device):
            return self.recalled(self.features(q), state)[0].to(x.dtype)

    def write(self, u: Tensor, state: State, rows: Tensor | None) -> State:
        """The state after memory tokens u (B, M, D), in the rows (B, 1, 1) where a segment has ended, or all."""
        matrix, norm = state["matrix"], state["norm"]
        k, v, rate = (x.to(norm.dtype) for x in (self.k_proj(u), self.v_proj(u), self.rate_proj(u)))
        with no_autocast(u.device):
            keys = self.features(k)
            old, weight = self.recalled(keys, state)
            new = matrix + keys.mT @ ((v - old) * torch.sigmoid(rate))
            if self.correction:
                gamma = (1 - weight / (keys.square().sum(-1, keepdim=True) + EPS)).clamp(0, 1).detach()
                gamma = gamma.masked_fill((norm == 0).all(-1)[:, None, None], 1)
                keys = keys * gamma
            total = norm + keys.sum(1)
        if rows is not None:
            new, total = torch.where(rows, new, matrix), torch.where(rows[..., 0], total, norm)
        return state.replace(matrix=new, norm=total)


class AssociativeRecurrentMemory(Memory):
    """Memory tokens behind each segment, which every block writes into a matrix of its own; see `Association`.

    Args:
        config: sizes.
        dim: model width D.
        layers: number of blocks.

    State, for each block, in at least float32: matrix (B, K, D) and norm (B, K), K = 2 key_dim order.
    """

    def __init__(self, config: AssociativeConfig, dim: int, layers: int) -> None:
        super().__init__()
        self.capabilities = associative_capabilities(config)
        self.shape = 2 * config.key_dim * config.order, dim
        # As an embedding's rows, which is what the official code makes them (modeling_amt/language_modeling.py).
        self.memory = nn.Parameter(torch.empty(config.tokens, dim))
        nn.init.normal_(self.memory, std=0.02)
        self.associations = nn.ModuleList(Association(config, dim) for _ in range(layers))

    def param_groups(self) -> dict[str, dict[str, Any]]:
        """Tokens are embeddings: no decay."""
        return {"memory": {"weight_decay": 0.0}}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        precise = torch.promote_types(dtype or self.memory.dtype, torch.float32)
        matrix = torch.zeros(batch, *self.shape, device=device or self.memory.device, dtype=precise)
        held = State({"matrix": matrix, "norm": matrix[..., 0].clone()}, {"matrix": KEPT, "norm": KEPT})
        return State(children={str(layer): held for layer in range(len(self.associations))})

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """The tokens behind a segment, the same for every one; none before it."""
        after = self.memory.expand(len(q), -1, -1)
        return Read(tokens=after[:, :0], after=after), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """What comes out of the last block has been written by then."""
        return state, {}

    def enter(self, layer: int, x: Tensor, state: State, ctx: Context = FRESH) -> Tensor:
        return x + self._of(layer).read(x, state.children[str(layer)])

    def leave(self, layer: int, u: Tensor, state: State, ctx: Context = FRESH) -> State:
        rows = None if ctx.mask is None else ctx.mask[:, :1, None]
        held = self._of(layer).write(u, state.children[str(layer)], rows)
        return State(children={**state.children, str(layer): held})

    def _of(self, layer: int) -> Association:
        part = self.associations[layer]
        assert isinstance(part, Association)
        return part


def build(config: AssociativeConfig, ctx: BuildContext) -> Memory:
    return AssociativeRecurrentMemory(config, ctx.dim, ctx.num_layers)
