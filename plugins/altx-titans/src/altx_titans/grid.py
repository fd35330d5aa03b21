"""Tokens of every row in chunks of its own: a chunk starts at a row's first real token, and again at every reset."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altx.context import Context
from altx.layout import take


class Grid(NamedTuple):
    """Tokens in the slots of N chunks. A call of one token has one chunk, of that one slot.

    Args:
        x: (B, N, C, D), 0 where there is no token.
        real: (B, N, C) bool, where there is a token.
        position: (B, N, C) int64, the slot's number in its chunk.
        fresh: (B, N) bool, chunks that start a fresh sequence; None if none does.
        full: (B, N) bool, chunks whose last token is here.
        offset: (B,) int64, tokens of each row's chunk that is open after the call.
        place: (B, T) int64, each token's slot among all N * C.
    """

    x: Tensor
    real: Tensor
    position: Tensor
    fresh: Tensor | None
    full: Tensor
    offset: Tensor
    place: Tensor

    def restore(self, y: Tensor) -> Tensor:
        """y (B, N, C, D) with the tokens where they were, (B, T, D)."""
        return take(y.flatten(1, 2), self.place)


def lay(x: Tensor, ctx: Context, offset: Tensor, size: int) -> Grid:
    """Lay the real tokens of x (B, T, D), T > 0, in chunks of `size`; resets make it look at their values.

    Args:
        x: (B, T, D).
        ctx: mask and resets.
        offset: (B,) int64, tokens of each row's open chunk that came before the call.
        size: tokens of a chunk.
    """
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if ctx.mask is None else ctx.mask
    reset = None if ctx.reset is None else ctx.reset & real
    if ctx.mask is not None:
        # Whatever a masked token holds, NaN included, stays out of every sum.
        x = x.masked_fill(~real[..., None], 0)
    if x.shape[1] == 1:
        before = offset[:, None] if reset is None else offset[:, None].masked_fill(reset, 0)
        after = before + real
        full = after == size
        place = torch.zeros_like(before)
        return Grid(x[:, None], real[:, None], before[:, None], reset, full, (after % size)[:, 0], place)
    place, width, fresh, after = (
        _aligned(real, offset, size) if reset is None else _restarted(real, reset, offset, size)
    )
    # Slot s holds token source[s]; masked tokens go to a slot beyond the last, and are dropped.
    length = x.shape[1]
    source = torch.full((len(x), width + 1), length, device=x.device)
    token = torch.arange(length, device=x.device).expand(len(x), -1)
    source = source.scatter(1, place.where(real, width), token)[:, :width]
    there = source < length
    slots = take(x, source.clamp(max=length - 1)).masked_fill(~there[..., None], 0)
    there = there.unflatten(1, (-1, size))
    position = torch.arange(size, device=x.device).expand_as(there)
    return Grid(
        slots.unflatten(1, (-1, size)), there, position, fresh, there[..., -1], after, place.clamp(0, width - 1)
    )


def _aligned(real: Tensor, offset: Tensor, size: int) -> tuple[Tensor, int, None, Tensor]:
    """Without resets: each token's slot, the number of slots, and the tokens in the chunk that stays open."""
    place = offset[:, None] + real.long().cumsum(1) - 1
    # As many chunks as any offset needs: its values decide nothing about shapes.
    width = -(-(real.shape[1] + size - 1) // size) * size
    return place, width, None, (offset + real.sum(1)) % size


def _restarted(real: Tensor, reset: Tensor, offset: Tensor, size: int) -> tuple[Tensor, int, Tensor, Tensor]:
    """With resets, each of which goes on at the start of the next chunk."""
    document = reset.long().cumsum(1)
    count = real.new_zeros(len(real), real.shape[1] + 1, dtype=torch.int64).scatter_add(1, document, real.long())
    held = torch.cat([count[:, :1] + offset[:, None], count[:, 1:]], 1)
    slots = -(-held // size) * size
    start = slots.cumsum(1) - slots
    first = count.cumsum(1) - count
    rank = real.long().cumsum(1) - 1
    place = start.gather(1, document) + rank - first.gather(1, document) + offset[:, None] * (document == 0)
    width = max(int(slots.sum(1).max()), size)
    fresh = real.new_zeros(len(real), width + 1)
    fresh = fresh.scatter(1, place.where(reset, width), True)[:, :width].unflatten(1, (-1, size))[..., 0]
    return place, width, fresh, held.gather(1, document[:, -1:])[:, 0] % size
