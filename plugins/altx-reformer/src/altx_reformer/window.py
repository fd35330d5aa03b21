"""The state of local attention: keys and values of the last few tokens.

B rows, T new tokens, S slots, H heads, D head width, W window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altx.layout import take
from altx.state import Leaf, State


@dataclass(frozen=True)
class Slots:
    """What queries may look at.

    Args:
        k, v: (B, S, H, D).
        index: (B, S) index of each slot's token among its row's real tokens.
        document: (B, S) index of the first token of its document (`ctx.reset` starts one), -1 in an empty slot.
    """

    k: Tensor
    v: Tensor
    index: Tensor
    document: Tensor


class WindowCache:
    """The last W - 1 tokens of a row, in order, at the end of W - 1 slots."""

    def __init__(self, heads: int, width: int, window: int) -> None:
        self.shape = window - 1, heads, width

    def empty(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token."""
        k, v = torch.zeros(2, batch, *self.shape, device=device, dtype=dtype).unbind()
        document = torch.full((batch, self.shape[0]), -1, device=device, dtype=torch.int64)
        leaf = Leaf(kind="kv")
        seen = torch.zeros(batch, device=device, dtype=torch.int64)
        return State({"k": k, "v": v, "document": document}, {"k": leaf, "v": leaf, "document": leaf}, seen=seen)

    def document(self, state: State) -> Tensor:
        """(B,) where each row's current document starts."""
        assert state.seen is not None
        # A window of 1 keeps no token, and needs to know no document.
        last = state["document"][:, -1] if self.shape[0] else torch.zeros_like(state.seen)
        return last.clamp(min=0)

    def extend(self, state: State, new: Slots, mask_BT: Tensor | None) -> tuple[State, Slots, int]:
        """The state after new tokens, real ones first, all slots that they may look at, and how many are old."""
        assert state.seen is not None
        size, count = self.shape[0], new.k.shape[1]
        index = state.seen[:, None] + torch.arange(-size, 0, device=state.seen.device)
        slots = Slots(
            torch.cat([state["k"], new.k.to(state["k"].dtype)], 1),
            torch.cat([state["v"], new.v.to(state["v"].dtype)], 1),
            torch.cat([index, new.index], 1),
            torch.cat([state["document"], new.document], 1),
        )
        if mask_BT is None:
            k, v, document = (t[:, count:].clone() for t in (slots.k, slots.v, slots.document))
            return state.replace(k=k, v=v, document=document, seen=state.seen + count), slots, size
        lengths = mask_BT.sum(1)
        last = lengths[:, None] + torch.arange(size, device=lengths.device)
        k, v, document = (take(t, last) for t in (slots.k, slots.v, slots.document))
        return state.replace(k=k, v=v, document=document, seen=state.seen + lengths), slots, size
