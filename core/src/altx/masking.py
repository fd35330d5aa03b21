"""Batches as layers want them: each row's real tokens first, or each document a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from altx.context import Context
from altx.layout import compaction, repack, take, unpack


@dataclass(frozen=True)  # not a named tuple, whose properties torch.compile of torch 2.10 does not take
class RealFirst:
    """x (B, T, ...) with its real tokens first and zeros after them, and what goes with it.

    Args:
        x: (B, T, ...).
        mask: (B, T) bool, where tokens are real; None if all are.
        reset: (B, T) bool, at real tokens only; None if there is none.
        back: (B, T) int64, the order that undoes the move; None if nothing moved.
    """

    x: Tensor
    mask: Tensor | None
    reset: Tensor | None
    back: Tensor | None

    @property
    def lengths(self) -> Tensor | None:
        """(B,) int64, real tokens of each row; None if all are real."""
        return None if self.mask is None else self.mask.sum(1)

    def restore(self, y: Tensor) -> Tensor:
        """y (B, T, ...) with the tokens where they were."""
        return y if self.back is None else take(y, self.back)


def real_first(x: Tensor, ctx: Context) -> RealFirst:
    """Move each row's real tokens to its start, so that what looks back finds real tokens only."""
    mask, reset = ctx.mask, ctx.reset
    if mask is None:
        return RealFirst(x, None, reset, None)
    # Whatever a masked token holds, NaN included, stays out of every sum.
    x = x.masked_fill(~mask[..., None], 0)
    reset = None if reset is None else reset & mask
    if x.shape[1] == 1:
        return RealFirst(x, mask, reset, None)
    order, back = compaction(mask)
    return RealFirst(take(x, order), take(mask, order), None if reset is None else take(reset, order), back)


class Documents(NamedTuple):
    """Documents as rows: N of them, the longest of S tokens.

    Args:
        x: (N, S, ...).
        mask: (N, S) bool, where tokens are real.
        there: (N, S) bool, where x has a token at all.
        shape: (B, T) of the batch that they are from.
    """

    x: Tensor
    mask: Tensor
    there: Tensor
    shape: tuple[int, int]

    def restore(self, y: Tensor) -> Tensor:
        """y (N, S, ...) with the tokens where they were, (B, T, ...)."""
        whole: Tensor = repack(y, self.there)[0].unflatten(0, self.shape)
        return whole


def by_document(x: Tensor, ctx: Context) -> Documents:
    """Each document of x (B, T, ...), from one `ctx.reset` to the next, as a row of its own."""
    batch, length = x.shape[:2]
    mask = x.new_ones(batch, length, dtype=torch.bool) if ctx.mask is None else ctx.mask
    first = torch.zeros_like(mask) if ctx.reset is None else ctx.reset & mask
    first = torch.cat([torch.ones_like(first[:, :1]), first[:, 1:]], 1)
    bounds = F.pad(first.flatten().nonzero().flatten(), (0, 1), value=batch * length)
    rows, there = unpack(x.flatten(0, 1)[None], bounds)
    return Documents(rows, unpack(mask.flatten()[None], bounds)[0] & there, there, (batch, length))
