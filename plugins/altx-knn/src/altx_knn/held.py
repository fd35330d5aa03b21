"""Where the tokens of a state are, and which of them can be found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from altx.layout import take
from altx.state import State
from altx_knn.config import KNNConfig


@dataclass(frozen=True)
class Held:
    """What each of B rows holds of its sequence; places are numbers of tokens in it.

    Args:
        config: the memory's.
        keys, values: (B, S, ...).
        seen: (B,) tokens of the row.
        first: (B,) how many of them came before the sequence.
    """

    config: KNNConfig
    keys: Tensor
    values: Tensor
    seen: Tensor
    first: Tensor

    @classmethod
    def of(cls, state: State, config: KNNConfig) -> Held:
        assert state.seen is not None
        document = state["document"]
        first = torch.zeros_like(state.seen)
        if document.shape[1]:
            first = take(document, (state.seen - 1).clamp(min=0)[:, None] % document.shape[1])[:, 0]
        return cls(config, state["keys"], state["values"], state.seen, first)

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    @cached_property
    def count(self) -> Tensor:
        """(B,) tokens of the sequence."""
        return self.seen - self.first

    @cached_property
    def done(self) -> Tensor:
        """(B,) tokens of its finished segments."""
        return self.count - self.count % self.config.segment

    @cached_property
    def oldest(self) -> Tensor:
        """(B,) place of the first that can be found."""
        return torch.zeros_like(self.done) if self.config.size is None else (self.done - self.config.size).clamp(min=0)

    @cached_property
    def sealed(self) -> Tensor:
        """(B,) tokens of its finished blocks."""
        return self.count - self.count % self.config.block_size

    @cached_property
    def graphed(self) -> tuple[Tensor, Tensor]:
        """(B,) each, the places from which and before which graphs are searched: whole blocks, all of whose tokens
        every token of the open segment may find, so that it does not matter how calls are cut."""
        if self.config.search == "exact":
            return self.done, self.done
        size = self.config.block_size
        low = (self.oldest + size - 1) // size * size
        high = torch.minimum(self.sealed, (self.done - self.config.after + 1).clamp(min=0) // size * size)
        return low, torch.maximum(low, high)

    @cached_property
    def lowest(self) -> list[int]:
        """Number of each row's first block of use: on disk any with a token that can be found, else one with a graph
        that is searched."""
        start = self.oldest // self.config.block_size
        if self.config.path is None:
            low, high = self.graphed
            start = (low // self.config.block_size).where(low < high, self.sealed // self.config.block_size)
        found: list[int] = start.tolist()
        return found

    @cached_property
    def used(self) -> int:
        """Slots that any row has filled."""
        return min(self.slots, int(self.seen.max())) if len(self.seen) else 0

    def slot(self, row: int, place: Tensor) -> Tensor:
        """Slots of a row's tokens."""
        return (self.first[row] + place) % self.slots

    def place(self, start: int, stop: int) -> Tensor:
        """(B, stop - start) places of the tokens in slots from start on; negative for those of other sequences."""
        slot = torch.arange(start, stop, device=self.seen.device)
        last = self.seen[:, None] - 1
        return last - (last - slot) % self.slots - self.first[:, None]
