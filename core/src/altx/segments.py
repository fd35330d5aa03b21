"""Rows cut on grids of their own: each row's segments start at its first real token, and again at every reset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from altx.context import Context
from altx.layout import compaction, take


@dataclass(frozen=True)
class Piece:
    """Tokens of every row, none of a row beyond the end of its segment. B rows, n tokens of the longest.

    Args:
        index: (B, n) int64, where each row's tokens stand in the call; (start, stop) if that is so in every row.
        mask: (B, n) bool, where there is a token; None if everywhere.
        first, last: of each row, whether its segment starts and ends here.
        reset: of each row, whether it starts a fresh sequence here.
        offset: of each row, tokens of its segment after the piece, 0 where it ended.
        ctx: the context of the piece.
    """

    index: Tensor | tuple[int, int]
    mask: Tensor | None
    first: list[bool]
    last: list[bool]
    reset: list[bool]
    offset: list[int]
    ctx: Context

    def take(self, x: Tensor) -> Tensor:
        """The piece of x (B, T, ...), with 0 where there is no token."""
        if isinstance(self.index, tuple):
            return x[:, slice(*self.index)]
        found = take(x, self.index)
        if self.mask is None:
            return found
        return found.masked_fill(~self.mask.reshape(*self.mask.shape, *[1] * (x.dim() - 2)), 0)


def pieces(x: Tensor, ctx: Context, offset: Sequence[int], size: int) -> Iterator[Piece]:
    """Cut the real tokens of x (B, T, ...) into pieces that end where segments do.

    Looks at the values of a mask and of resets, which synchronises with the device.

    Args:
        ctx: of the call; not packed.
        offset: tokens of each row's open segment that came before the call.
        size: tokens of a segment.
    """
    batch, length = x.shape[:2]
    if ctx.mask is None and ctx.reset is None and len(set(offset)) == 1:
        yield from _alike(batch, length, ctx, offset[0], size)
        return
    order = None if ctx.mask is None else compaction(ctx.mask)[0]
    counts = [length] * batch if ctx.mask is None else ctx.mask.sum(1).tolist()
    starts: list[list[int]] = [[] for _ in range(batch)]
    if ctx.reset is not None:
        flags = ctx.reset if ctx.mask is None or order is None else take(ctx.reset & ctx.mask, order)
        for row, place in flags.nonzero().tolist():
            starts[row].append(place)
    offset, done = list(offset), [0] * batch
    device = x.device
    while any(now < count for now, count in zip(done, counts, strict=True)):
        sizes, first, last, fresh = [], [], [], []
        for row, (now, count) in enumerate(zip(done, counts, strict=True)):
            there = now < count
            fresh.append(there and now in starts[row])
            if fresh[-1]:
                offset[row] = 0
            reset = next((place for place in starts[row] if place > now), count)
            sizes.append(min(count, now + size - offset[row], reset) - now)
            first.append(there and offset[row] == 0)
            offset[row] = (offset[row] + sizes[-1]) % size
            last.append(there and offset[row] == 0)
        width = max(sizes)
        begin = torch.tensor(done, device=device)[:, None]
        index = (begin + torch.arange(width, device=device)).clamp(max=length - 1)
        index = index if order is None else order.gather(1, index)
        mask = None
        if any(n < width for n in sizes):
            mask = torch.arange(width, device=device) < torch.tensor(sizes, device=device)[:, None]
        done = [now + n for now, n in zip(done, sizes, strict=True)]
        here = ctx.replace(
            mask=mask,
            positions=None if ctx.positions is None else take(ctx.positions, index),
            reset=None if ctx.reset is None else take(ctx.reset, index),
            shared={name: take(value, index) for name, value in ctx.shared.items()},
        )
        yield Piece(index, mask, first, last, fresh, list(offset), here)


def split(x: Tensor, ctx: Context, offset: Sequence[int], size: int) -> Iterator[tuple[Piece, Tensor]]:
    """The pieces of x (B, T, ...), each with its tokens; arguments as for `pieces`."""
    cuts = [*pieces(x, ctx, offset, size)]
    bounds = [cut.index for cut in cuts if isinstance(cut.index, tuple)]
    if len(bounds) == len(cuts):
        # Not slice by slice, each of whose gradients would be as long as x.
        yield from zip(cuts, x.split([stop - start for start, stop in bounds], 1) if bounds else (), strict=True)
    else:
        yield from ((cut, cut.take(x)) for cut in cuts)


def _alike(batch: int, length: int, ctx: Context, offset: int, size: int) -> Iterator[Piece]:
    """Pieces of rows that are cut alike."""
    start = 0
    while start < length:
        stop, first = min(length, start + size - offset), offset == 0
        offset = (offset + stop - start) % size
        flags = [first] * batch, [offset == 0] * batch, [False] * batch, [offset] * batch
        yield Piece((start, stop), None, *flags, ctx.slice(start, stop))
        start = stop


def gathered(parts: Sequence[tuple[Piece, Tensor]], like: Tensor) -> Tensor:
    """What came of pieces of `like` (B, T, ...), each (B, n, ...), where their tokens stood; 0 elsewhere."""
    batch, length = like.shape[:2]
    whole = torch.cat([y for _, y in parts], 1) if len(parts) > 1 else parts[0][1]
    places = [(piece.index, piece.mask) for piece, _ in parts if not isinstance(piece.index, tuple)]
    if not places:
        return whole
    index = torch.cat([at if mask is None else at.where(mask, length) for at, mask in places], 1)
    out = whole.new_zeros(batch, length + 1, *whole.shape[2:])
    spread = index.reshape(*index.shape, *[1] * (whole.dim() - 2)).expand_as(whole)
    return out.scatter(1, spread, whole)[:, :length]
