"""How a chunk changes the states: each by a gated update, then all by attention to each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in x's dtype (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)


class Cell(nn.Module):
    """s <- s + m (GRU(u, s) - s), then s <- s + m attention(norm(s)) among living states; m is 0 to 1 for each.

    Weights are used in the dtype of the states.

    Args:
        width: of a state, W.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.gru = nn.GRUCell(width, width)
        self.norm = RMSNorm(width)
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        # At first a state takes over what it is told, so that it can be read from the first step of training on.
        nn.init.orthogonal_(self.gru.weight_ih.data[2 * width :], gain=2.0)
        for bias in (self.gru.bias_ih, self.gru.bias_hh):
            nn.init.constant_(bias.data[width : 2 * width], -1.0)

    def forward(self, u: Tensor, states: Tensor, strength: Tensor, alive: Tensor, at: Tensor | None = None) -> Tensor:
        """The new states (B, S, W).

        Args:
            u: (B, n, W), what n states are told.
            states: (B, S, W).
            strength: (B, n, 1) from 0 to 1, the part that is made of each change; with 0 a state holds every bit.
            alive: (S,) bool, states that others attend to.
            at: (B, n) indices of these n states, the others hold; None for all, n being S.
        """
        index = None if at is None else at[..., None].expand(-1, -1, states.shape[-1])
        some = states if index is None else states.gather(1, index)
        some = some.lerp(self._gated(u, some), strength)
        changed = some if index is None else states.scatter(1, index, some)
        some = some + strength * self._heard(some, changed, alive)
        return some if index is None else states.scatter(1, index, some)

    def _gated(self, u: Tensor, states: Tensor) -> Tensor:
        """The GRU of PyTorch, Cho et al. 2014 (arXiv:1406.1078) with the reset gate after the matrix product."""
        gru = self.gru
        weights = (w.to(states.dtype) for w in (gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh))
        return torch.gru_cell(u.flatten(0, 1), states.flatten(0, 1), *weights).view_as(states)

    def _heard(self, some: Tensor, states: Tensor, alive: Tensor) -> Tensor:
        """What some states (B, n, W) hear from the living ones of all (B, S, W): (B, n, W)."""
        of_q, of_kv = self.in_proj.weight.split((some.shape[-1], 2 * some.shape[-1]))
        q = _linear(self.norm(some), of_q).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = _linear(self.norm(states), of_kv).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~alive, torch.finfo(scores.dtype).min)
        heard = torch.softmax(scores, -1) @ v
        return _linear(heard.transpose(1, 2).flatten(2), self.out_proj.weight)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
