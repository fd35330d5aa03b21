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
    """s <- GRU(u, s), then s <- s + attention(norm(s)) among living states; states that were not touched hold.

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

    def forward(self, u: Tensor, states: Tensor, touched: Tensor, alive: Tensor) -> Tensor:
        """The new states (B, S, W).

        Args:
            u: (B, S, W), what each state is told.
            states: (B, S, W).
            touched: (B, S) bool, states that change.
            alive: (S,) bool, states that others attend to.
        """
        changed = torch.where(touched[..., None], self._gated(u, states), states)
        return changed + torch.where(touched[..., None], self._heard(changed, alive), 0)

    def _gated(self, u: Tensor, states: Tensor) -> Tensor:
        """The GRU of PyTorch, Cho et al. 2014 (arXiv:1406.1078) with the reset gate after the matrix product."""
        gru = self.gru
        reset, update, new = _linear(u, gru.weight_ih, gru.bias_ih).chunk(3, -1)
        held_reset, held_update, held_new = _linear(states, gru.weight_hh, gru.bias_hh).chunk(3, -1)
        update = torch.sigmoid(update + held_update)
        new = torch.tanh(new + torch.sigmoid(reset + held_reset) * held_new)
        return new + update * (states - new)

    def _heard(self, states: Tensor, alive: Tensor) -> Tensor:
        """What the states hear from the living ones, themselves included: (B, S, W)."""
        every = _linear(self.norm(states), self.in_proj.weight).unflatten(-1, (3, self.heads, -1))
        q, k, v = every.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~alive, torch.finfo(scores.dtype).min)
        heard = torch.softmax(scores, -1) @ v
        return _linear(heard.transpose(1, 2).flatten(2), self.out_proj.weight)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
