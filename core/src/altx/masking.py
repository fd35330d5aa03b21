"""Masked batches as a recurrence wants them: each row's real tokens first."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from altx.context import Context
from altx.layout import compaction, take


class RealFirst(NamedTuple):
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
