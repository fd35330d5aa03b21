"""The two states of attention: every token so far, or the last few.

B rows, S slots, G key-value heads, D head width, W window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import advanced
from altx.layout import append, take
from altx.state import Leaf, State


@dataclass(frozen=True)
class Slots:
    """What queries may look at.

    Args:
        k: (B, S, G, D), rotated.
        v: (B, S, G, D).
        index: (B, S) index of each slot's token among its row's real tokens.
        document: (B, S) index of the first token of its document (`ctx.reset` starts one), -1 in an empty slot.
    """

    k: Tensor
    v: Tensor
    index: Tensor
    document: Tensor


class GrowingCache:
    """Every token: slot j of a row holds its j-th real token, so the last ones can be cropped exactly."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self.shape = heads, head_dim

    def empty(self, batch: int, capacity: int | None, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token, with room for `capacity` of them."""
        k, v = torch.zeros(2, batch, capacity or 0, *self.shape, device=device, dtype=dtype).unbind()
        document = torch.zeros(batch, capacity or 0, device=device, dtype=torch.int32)
        leaf = Leaf(seq_dim=1, kind="kv")
        seen = torch.zeros(batch, device=device, dtype=torch.int64)
        return State({"k": k, "v": v, "document": document}, {"k": leaf, "v": leaf, "document": leaf}, seen=seen)

    def document(self, state: State) -> Tensor:
        """(B,) where each row's current document starts."""
        assert state.seen is not None
        if not state["document"].shape[1]:
            return torch.zeros_like(state.seen)
        return take(state["document"], (state.seen - 1).clamp(min=0)[:, None])[:, 0].long()

    def extend(self, state: State, new: Slots, ctx: Context) -> tuple[State, Slots]:
        """The state after new tokens, and all the slots that they may look at.

        Slots beyond a row's last token are not marked empty: only a causal query may look.
        """
        assert state.seen is not None
        k, v, document = (
            append(state[name], value, state.seen, ctx.mask, in_place=ctx.donate_state)
            for name, value in (("k", new.k), ("v", new.v), ("document", new.document))
        )
        index = torch.arange(k.shape[1], device=k.device)[None]
        seen = advanced(state.seen, new.k, ctx)
        return state.replace(k=k, v=v, document=document, seen=seen), Slots(k, v, index, document)


class WindowCache:
    """The last W - 1 tokens of a row, in order, at the end of W - 1 slots."""

    def __init__(self, heads: int, head_dim: int, window: int) -> None:
        self.shape = window - 1, heads, head_dim

    def empty(self, batch: int, capacity: int | None, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token. Its size is constant, so there is nothing to reserve."""
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

    def extend(self, state: State, new: Slots, ctx: Context) -> tuple[State, Slots]:
        """The state after new tokens, and all the slots that they may look at."""
        assert state.seen is not None
        index = state.seen[:, None] + torch.arange(-self.shape[0], 0, device=state.seen.device)
        slots = Slots(
            torch.cat([state["k"], new.k.to(state["k"].dtype)], 1),
            torch.cat([state["v"], new.v.to(state["v"].dtype)], 1),
            torch.cat([index, new.index], 1),
            torch.cat([state["document"], new.document], 1),
        )
        count = new.k.shape[1]
        if ctx.mask is None:
            k, v, document = (t[:, count:].clone() for t in (slots.k, slots.v, slots.document))
        else:
            # A stable sort moves the empty slots to the front and keeps the order of the others.
            last = (slots.document >= 0).argsort(dim=1, stable=True)[:, count:]
            document = take(slots.document, last)
            k, v = (take(t, last).where(document[..., None, None] >= 0, 0) for t in (slots.k, slots.v))
        state = state.replace(k=k, v=v, document=document, seen=advanced(state.seen, new.k, ctx))
        return state, slots
