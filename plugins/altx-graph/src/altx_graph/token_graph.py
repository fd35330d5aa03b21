"""Graphs made from a sequence: each token's edges come from tokens a few places away.

B rows, T tokens of a call, K tokens kept from before it, S = K + T slots, O edges of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_graph.edges import Edges
from altx_graph.slots import Slots


@dataclass(frozen=True)
class TokenGraph:
    """A rule for edges.

    Args:
        offsets: how many real tokens back an edge may come from, the farthest first. Without `causal`, also forward.
        nearest: how many of them are kept, those nearest in feature space (Euclidean); None for all.
        loops: whether a token has an edge from itself.
        degrees: whether edges are counted; only with loops.
    """

    offsets: Sequence[int]
    nearest: int | None = None
    loops: bool = False
    degrees: bool = False

    @property
    def reach(self) -> int:
        """How many tokens before a token it may see."""
        return max(self.offsets)

    def edges(self, slots: Slots, causal: bool) -> Edges:
        """The edges into the tokens of the call."""
        rows, size = slots.x.shape[:2]
        length = size - slots.kept
        ahead = [] if causal else [-o for o in reversed(self.offsets)]
        offsets = [*self.offsets, *([0] if self.loops else []), *ahead]
        back = torch.tensor(offsets, device=slots.x.device)
        target = torch.arange(slots.kept, size, device=slots.x.device)
        source_TO = target[:, None] - back
        there = (source_TO >= 0) & (source_TO < size)
        source_TO = source_TO.clamp(0, size - 1)
        source, there = source_TO.expand(rows, -1, -1), there.expand(rows, -1, -1)
        if slots.document is not None:
            # Masked tokens and empty slots are of one document, which no real token is of.
            there = there & (slots.document[:, source_TO] == slots.document[:, slots.kept :, None])
        if self.nearest is not None:
            source, there = self._choose(slots, offsets, source, there)
        row = torch.arange(rows, device=slots.x.device)[:, None, None]
        into = (row * length + target[:, None] - slots.kept).expand_as(source)
        return Edges(
            (row * size + source).flatten(),
            into.where(there, rows * length).flatten(),
            made=True,
            degree=self._degree(slots, there) if self.degrees else None,
        )

    def _choose(self, slots: Slots, offsets: list[int], source: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of each token's candidates, in their order, and itself: (B, T, k)."""
        assert self.nearest is not None
        far = distances(slots, offsets).masked_fill(~there, torch.inf)
        if self.loops:
            far[..., offsets.index(0)] = -1
        best = far.topk(min(self.nearest + self.loops, len(offsets)), dim=-1, largest=False).indices.sort(-1).values
        return source.gather(2, best), there.gather(2, best)

    def _degree(self, slots: Slots, there: Tensor) -> Tensor:
        """(B, S) edges into each slot, one from itself among them.

        Those into a kept token come from tokens that are gone; how many there were follows from its place.
        """
        degree = there.sum(-1)
        if not slots.kept:
            return degree
        assert slots.place is not None
        before = slots.place[:, : slots.kept, None]
        count = (before >= torch.tensor(self.offsets, device=degree.device)).sum(-1)
        if self.nearest is not None:
            count = count.clamp(max=self.nearest)
        return torch.cat([count + 1, degree], 1)


@torch.no_grad()
def distances(slots: Slots, offsets: Sequence[int]) -> Tensor:
    """(B, T, O) squared Euclidean distances to the tokens at these offsets back; anything where there is none."""
    x = slots.x.float() if slots.x.dtype in (torch.float16, torch.bfloat16) else slots.x
    own = x[:, slots.kept :]
    left, right = max(max(offsets) - slots.kept, 0), max(-min(offsets), 0)
    x = F.pad(x, (0, 0, left, right))
    first = left + slots.kept
    return torch.stack([(own - x[:, first - o : first - o + own.shape[1]]).square().sum(-1) for o in offsets], -1)
