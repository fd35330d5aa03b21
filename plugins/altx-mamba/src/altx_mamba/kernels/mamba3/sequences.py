"""Where the sequences of a batch start and end: rows, or stretches of one row, cut by resets."""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """Sequences among the tokens of x (B, T, ...), T > 0: S = B of them, or those between cu_seqlens.

    Args:
        x: (B, T, ...), for its shape and device.
        reset: (B, T) bool or None.
        lengths: (B,) or None; the tokens of a row after so many are padding.
        cu_seqlens: (S+1,) or None; with it, B is 1 and there is no padding.
    """

    def __init__(
        self, x: Tensor, reset: Tensor | None, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> None:
        self.reset = reset
        self.lengths = lengths
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(x.device, torch.int64)
        self.step = torch.arange(x.shape[1], device=x.device)
        self.fresh = reset
        if self.cu_seqlens is not None:
            counts = self.cu_seqlens.diff()
            index = torch.arange(len(counts), device=x.device)
            # Empty sequences have no token, and the next one's first is not theirs.
            self.empty = counts == 0
            self.first = torch.where(self.empty, x.shape[1], self.cu_seqlens[:-1])
            self.index = torch.repeat_interleave(index, counts, output_size=x.shape[1])
            starts = (self.step == self.cu_seqlens[self.index])[None]
            self.fresh = starts if reset is None else starts | reset

    def shift(self, value: Tensor, first: Tensor) -> Tensor:
        """What value (B, T, ...) was one token before, and `first` (S, ...) at the first token of a sequence."""
        if self.cu_seqlens is None:
            return torch.cat([first[:, None], value[:, :-1]], 1)
        before = torch.cat([value[0, :1], value[0]])  # the last row is where empty sequences write
        return before.index_copy(0, self.first, first)[None, :-1]

    def last(self, value: Tensor, before: Tensor) -> Tensor:
        """value (B, T, ...) at the last token of each sequence: (S, ...); `before` (S, ...) where it has none."""
        if self.cu_seqlens is None:
            return value[:, -1].clone()  # a view would keep all of value alive
        found = value[0].index_select(0, (self.cu_seqlens[1:] - 1).clamp(min=0))
        return torch.where(_rows(self.empty, found), before, found)

    def last_real(self, value: Tensor, before: Tensor) -> Tensor:
        """As `last`, padding left out."""
        if self.lengths is None:
            return self.last(value, before)
        index = _rows((self.lengths - 1).clamp(min=0), value)
        found = value.gather(1, index.expand(-1, 1, *value.shape[2:]))[:, 0]
        return torch.where(_rows(self.lengths == 0, found), before, found)

    def carried(self, before: Tensor) -> Tensor:
        """before (S, ...), what a sequence starts from, for its tokens up to a reset, then 0: (B, T or 1, ...)."""
        spread = before[:, None] if self.cu_seqlens is None else before[self.index][None]
        if self.reset is None:
            return spread
        resets = self.reset.cumsum(1)
        if self.cu_seqlens is not None:
            resets = resets - (resets - self.reset.long())[:, self.cu_seqlens[self.index]]
        return torch.where(resets.reshape(*resets.shape, *[1] * (before.dim() - 1)) > 0, 0, spread)


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """(S,) as (S, 1, 1, ...), to go with `like`."""
    return value.reshape(-1, *[1] * (like.dim() - 1))
