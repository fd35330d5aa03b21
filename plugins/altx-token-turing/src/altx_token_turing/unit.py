"""The parts of a Token Turing Machine (Ryoo et al. 2022, arXiv:2211.09119, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6
"""Of every norm, as in the authors' code, whose gelu is the tanh one."""


class MLP(nn.Sequential):
    """Two layers with a gelu between them."""

    def __init__(self, dim: int, hidden: int, out: int, *, bias: bool = True) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, out, bias=bias))
        initialise(self)


def initialise(module: nn.Module) -> None:
    """As the authors' code does, but for their biases of 1e-6."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


class TokenLearner(nn.Module):
    """N tokens to n, each a mean of the N by weights of its own (Ryoo et al. 2021, arXiv:2106.11297, version 1.1).

    Args:
        dim: D.
        tokens: n.
        bottleneck: hidden width of what gives the weights.
    """

    def __init__(self, dim: int, tokens: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        # What is the same for all tokens the softmax over them cancels, as it does with a bias of keys.
        self.choose = MLP(dim, bottleneck, tokens, bias=False)

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """x (B, N, D) to (B, n, D); where `there` (B, N) is false there is no token."""
        score: Tensor = self.choose(self.norm(x))
        if there is not None:
            score = score.masked_fill(~there[..., None], float("-inf"))
        return score.softmax(1).mT @ x


class Block(nn.Module):
    """A pre-norm transformer block over all tokens."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, eps=EPS)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=EPS)
        self.feed_forward = MLP(dim, hidden, dim)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (each(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projections)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Unit(nn.Module):
    """One step: read, process, write.

        O = process(learn_r([M; I])),    M' = learn_m([M; I; O])

    Args:
        dim: D.
        memory: memory tokens m.
        process: output tokens r.
        layers, heads, hidden: of the transformer between, which has learned positions.
        bottleneck: hidden width of what chooses tokens.
    """

    def __init__(
        self, dim: int, *, memory: int, process: int, layers: int, heads: int, hidden: int, bottleneck: int
    ) -> None:
        super().__init__()
        self.read_tokens = TokenLearner(dim, process, bottleneck)
        self.position = nn.Parameter(torch.empty(process, dim))
        nn.init.normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.write_tokens = TokenLearner(dim, memory, bottleneck)

    def read(self, memory: Tensor, frame: Tensor, there: Tensor | None = None) -> Tensor:
        """O (B, r, D) of M (B, m, D) and I (B, n, D), of which those `there` (B, n) are real."""
        if there is not None:
            there = torch.cat([there.new_ones(memory.shape[:2]), there], 1)
        chosen = self.read_tokens(torch.cat([memory, frame], 1), there)
        output: Tensor = self.norm(self.blocks(chosen + self.position))
        return output

    def write(self, memory: Tensor, frame: Tensor, output: Tensor) -> Tensor:
        """M' (B, m, D)."""
        new: Tensor = self.write_tokens(torch.cat([memory, frame, output], 1))
        return new
