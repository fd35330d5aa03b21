"""Which document a token belongs to: `ctx.reset` starts one within a row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altx.context import Context
from altx.layout import take
from altx.masking import RealFirst


@dataclass(frozen=True)
class Places:
    """Where tokens stand, each row's real ones first.

    Args:
        index: (B or 1, T) index of a token among its row's real ones.
        position: (B or 1, T) what rotation turns it by.
        document: (B, T) index of the first token of its document, or None where all are of one.
    """

    index: Tensor
    position: Tensor
    document: Tensor | None


def places(tokens: RealFirst, ctx: Context, seen: Tensor | None, current: Tensor | None) -> Places:
    """Where the tokens of a call stand.

    Args:
        tokens: of the call.
        ctx: of the call.
        seen: (B,) real tokens before it, or None if there is no state.
        current: (B,) where each row's open document starts, or None if there is no state.
    """
    # Rows that differ in nothing share their indices.
    index = Context().ranks(tokens.x if seen is not None else tokens.x[:1], seen)
    position = ctx.positions
    if position is None:
        position = index
    elif tokens.back is not None:
        position = take(position, tokens.back.argsort(1))
    if tokens.reset is None:
        return Places(index, position, None if current is None else current[:, None].expand(-1, tokens.x.shape[1]))
    start = index.new_zeros(()) if current is None else current[:, None]
    return Places(index, position, index.where(tokens.reset, start).cummax(1).values)
