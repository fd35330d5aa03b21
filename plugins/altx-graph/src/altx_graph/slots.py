"""The tokens that an edge may come from: those of the call, and the last few before it.

B rows, T tokens of a call, K tokens kept, S = K + T slots, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altx.layout import take
from altx.masking import RealFirst
from altx.state import Leaf, State

SPEC = {"x": Leaf(kind="conv"), "document": Leaf(kind="counter")}


class Slots(NamedTuple):
    """K tokens kept and T of a call, in each row.

    Args:
        x: (B, S, D).
        kept: K.
        place: (B, S) index of each slot's token in its document; None if slot j holds token j of the only one.
        document: (B, S) index of the first token of its document, -1 in an empty slot; None as above.
    """

    x: Tensor
    kept: int
    place: Tensor | None = None
    document: Tensor | None = None


def empty(batch: int, kept: int, dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> State:
    """The state before the first token: `kept` empty slots."""
    leaves = {
        "x": torch.zeros(batch, kept, dim, device=device, dtype=dtype),
        "document": torch.full((batch, kept), -1, device=device, dtype=torch.int64),
    }
    return State(leaves, SPEC, seen=torch.zeros(batch, device=device, dtype=torch.int64))


def gather(batch: RealFirst, state: State | None) -> tuple[Slots, State | None]:
    """What the tokens of a call may see, and the state after them. Each row's real tokens come first."""
    x = batch.x
    if state is None and batch.mask is None and batch.reset is None:
        return Slots(x, 0), None
    rows, length = x.shape[:2]
    step = torch.arange(length, device=x.device)
    if state is None:
        document = documents(batch, step.expand(rows, -1), step.new_zeros(rows))
        return Slots(x, 0, step - document, document), None
    assert state.seen is not None
    kept = state["x"].shape[1]
    open_ = state["document"][:, -1].clamp(min=0)
    document = torch.cat([state["document"], documents(batch, state.seen[:, None] + step, open_)], 1)
    index = state.seen[:, None] + torch.arange(-kept, length, device=x.device)
    slots = Slots(torch.cat([state["x"].to(x.dtype), x], 1), kept, index - document, document)
    held = slots.x if state["x"].dtype == x.dtype else torch.cat([state["x"], x.to(state["x"].dtype)], 1)
    if batch.lengths is None:
        held, document = held[:, length:].clone(), document[:, length:].clone()
        seen = state.seen + length
    else:
        last = batch.lengths[:, None] + torch.arange(kept, device=x.device)
        held, document = take(held, last), take(document, last)
        seen = state.seen + batch.lengths
    return slots, state.replace(x=held, document=document, seen=seen)


def documents(batch: RealFirst, index: Tensor, open_: Tensor) -> Tensor:
    """(B, T) index of the first token of each token's document, -1 where it is masked.

    Args:
        index: (B, T) of each token in its row.
        open_: (B,) where the documents start that go on from before.
    """
    document = open_[:, None].expand_as(index)
    if batch.reset is not None:
        document = index.where(batch.reset, document).cummax(1).values
    return document if batch.mask is None else document.where(batch.mask, -1)
