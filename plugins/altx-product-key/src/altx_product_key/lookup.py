"""What the memories have in common: nothing to carry, and a table of values of which few rows are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH
from altx.memory import Memory, Read, Scan
from altx.state import State


class Lookup(Memory):
    """A memory that training writes: a call reads it, and leaves it as it is."""

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
        return Read(self.look_up(q)), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        return state, {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """All tokens at once: none sees another."""
        return Scan(Read(self.look_up(x)), state)

    @abstractmethod
    def look_up(self, x: Tensor) -> Tensor:
        """Values (B, T, D) for the tokens x (B, T, D)."""


def table(rows: int, width: int) -> nn.EmbeddingBag:
    """Values (rows, width), each of length about 1."""
    values = nn.EmbeddingBag(rows, width, mode="sum", _weight=torch.empty(rows, width))
    nn.init.normal_(values.weight, std=width**-0.5)
    return values


def weighted_sum(values: nn.EmbeddingBag, chosen: Tensor, weights: Tensor) -> Tensor:
    """For each of M tokens the sum of the rows that its heads chose, in the dtype of the values.

    Only the rows that somebody chose are read, and no copy of them is made.

    Args:
        chosen: (H, M, k) int64 rows.
        weights: (H, M, k).

    Returns:
        (M, width).
    """
    bags, shares = (t.transpose(0, 1).flatten(1) for t in (chosen, weights))
    return F.embedding_bag(bags, values.weight, mode="sum", per_sample_weights=shares.to(values.weight.dtype))
