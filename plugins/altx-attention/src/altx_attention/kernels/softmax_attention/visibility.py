"""Which slots a query of the op sees.

B rows, T queries, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """The op's arguments that decide it."""

    causal: bool = True
    window: int | None = None
    offset: Tensor | None = None
    document: Tensor | None = None
    slot_document: Tensor | None = None

    def visible(self, count: int, slots: int, device: torch.device) -> Tensor | None:
        """(B or 1, T, S) bool: whether a query sees a slot; None where every one sees all."""
        visible: Tensor | None = None
        if self.causal or self.window is not None:
            query, slot = self.standing(count, slots, device)[..., None], torch.arange(slots, device=device)
            if self.causal:
                visible = slot <= query
            if self.window is not None:
                near = slot > query - self.window
                visible = near if visible is None else visible & near
                if not self.causal:
                    visible = visible & (slot < query + self.window)
        if self.document is not None and self.slot_document is not None:
            same = self.document[..., None] == self.slot_document[:, None]
            visible = same if visible is None else visible & same
        return visible

    def standing(self, count: int, slots: int, device: torch.device) -> Tensor:
        """(B or 1, T) the slot that each query stands at; without `offset` the last query stands at the last."""
        step = torch.arange(count, device=device)
        return (step + (slots - count))[None] if self.offset is None else self.offset[:, None] + step
