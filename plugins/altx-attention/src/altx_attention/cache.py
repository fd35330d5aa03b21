"""The two states of attention: every token so far, or the last few.

B rows, T new tokens, S slots, W window. What a token leaves behind is given by name and shape: `{"k": (G, D), ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from altx.layout import append, take
from altx.state import Leaf, State


@dataclass(frozen=True)
class Slots:
    """What queries may look at.

    Args:
        leaves: (B, S, ...) by name.
        document: (B, S) index of the first token of each slot's document (`ctx.reset` starts one); -1 in an empty slot,
            unless that lies behind the row's last token.
        offset: (B,) slot of each row's first new token; None if the new tokens are in the last T slots.
    """

    leaves: Mapping[str, Tensor]
    document: Tensor
    offset: Tensor | None


def advanced(seen: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """`seen` after `count` tokens of which those of the mask (B, T) are real."""
    return seen + (count if mask is None else mask.sum(1))


class GrowingCache:
    """Every token: slot j of a row holds its j-th real token, so the last ones can be cropped exactly."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.shapes = shapes

    def empty(self, batch: int, capacity: int | None, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token, with room for `capacity` of them."""
        room = batch, capacity or 0
        leaves = {name: torch.zeros(*room, *shape, device=device, dtype=dtype) for name, shape in self.shapes.items()}
        leaves["document"] = torch.zeros(room, device=device, dtype=torch.int32)
        seen = torch.zeros(batch, device=device, dtype=torch.int64)
        return State(leaves, dict.fromkeys(leaves, Leaf(seq_dim=1, kind="kv")), seen=seen)

    def document(self, state: State) -> Tensor:
        """(B,) where each row's current document starts."""
        assert state.seen is not None
        if not state["document"].shape[1]:
            return torch.zeros_like(state.seen)
        return take(state["document"], (state.seen - 1).clamp(min=0)[:, None])[:, 0].long()

    def extend(
        self, state: State, new: Mapping[str, Tensor], document: Tensor, mask: Tensor | None, *, donated: bool
    ) -> tuple[State, Slots]:
        """The state after new tokens, each row's real ones first, and all the slots that they may look at.

        Args:
            new: (B, T, ...) by name.
            document: (B, T) index of the first token of each new token's document.
            mask: (B, T), or None.
            donated: whether the state may be written to.
        """
        assert state.seen is not None
        leaves = {
            name: append(state[name], value, state.seen, mask, in_place=donated)
            for name, value in {**new, "document": document}.items()
        }
        after = state.replace(**leaves, seen=advanced(state.seen, document.shape[1], mask))
        return after, Slots({name: leaves[name] for name in new}, leaves["document"], state.seen)


class WindowCache:
    """The last W - 1 tokens of a row, in order, at the end of W - 1 slots."""

    def __init__(self, window: int, **shapes: tuple[int, ...]) -> None:
        self.kept = window - 1
        self.shapes = shapes

    def empty(self, batch: int, capacity: int | None, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token. Its size is constant, so there is nothing to reserve."""
        room = batch, self.kept
        leaves = {name: torch.zeros(*room, *shape, device=device, dtype=dtype) for name, shape in self.shapes.items()}
        leaves["document"] = torch.full(room, -1, device=device, dtype=torch.int64)
        seen = torch.zeros(batch, device=device, dtype=torch.int64)
        return State(leaves, dict.fromkeys(leaves, Leaf(kind="kv")), seen=seen)

    def document(self, state: State) -> Tensor:
        """(B,) where each row's current document starts."""
        assert state.seen is not None
        # A window of 1 keeps no token, and needs to know no document.
        last = state["document"][:, -1] if self.kept else torch.zeros_like(state.seen)
        return last.clamp(min=0)

    def extend(
        self, state: State, new: Mapping[str, Tensor], document: Tensor, mask: Tensor | None, *, donated: bool
    ) -> tuple[State, Slots]:
        """As that of a growing cache."""
        assert state.seen is not None
        count = document.shape[1]
        held = document if mask is None else document.where(mask, -1)
        leaves = {name: torch.cat([state[name], value.to(state[name].dtype)], 1) for name, value in new.items()}
        documents = torch.cat([state["document"], held], 1)
        slots = Slots(leaves, documents, None)
        if mask is None:
            kept = {name: value[:, count:].clone() for name, value in leaves.items()}
            documents = documents[:, count:].clone()
        else:
            # A stable sort moves the empty slots to the front and keeps the order of the others.
            last = (documents >= 0).argsort(dim=1, stable=True)[:, count:]
            documents = take(documents, last)
            kept = {
                name: take(value, last).where((documents >= 0).reshape(*last.shape, *[1] * (value.dim() - 2)), 0)
                for name, value in leaves.items()
            }
        return state.replace(**kept, document=documents, seen=advanced(state.seen, count, mask)), slots
