"""The state of LSH attention: keys, values and buckets of every token.

B rows, T new tokens, S slots, H heads, D head width, R rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import advanced
from altx.layout import append
from altx.state import Leaf, State


@dataclass(frozen=True)
class Slots:
    """What queries may look at; slot j of a row holds its j-th real token.

    Args:
        k, v: (B, S, H, D).
        bucket: (B, S, H, R).
        document: (B, S) index of the first token of its document (`ctx.reset` starts one).
    """

    k: Tensor
    v: Tensor
    bucket: Tensor
    document: Tensor


LEAVES = ("k", "v", "bucket", "document")


def empty(
    batch: int, capacity: int, heads: int, width: int, rounds: int, device: torch.device | str, dtype: torch.dtype
) -> State:
    """The state before the first token, with room for `capacity` of them."""
    k, v = torch.zeros(2, batch, capacity, heads, width, device=device, dtype=dtype).unbind()
    leaves = {
        "k": k,
        "v": v,
        "bucket": torch.zeros(batch, capacity, heads, rounds, device=device, dtype=torch.int32),
        "document": torch.zeros(batch, capacity, device=device, dtype=torch.int64),
    }
    seen = torch.zeros(batch, device=device, dtype=torch.int64)
    return State(leaves, {name: Leaf(seq_dim=1, kind="kv") for name in LEAVES}, seen=seen)


def current_document(state: State) -> Tensor:
    """(B,) where each row's current document starts."""
    assert state.seen is not None
    if not state["document"].shape[1]:
        return torch.zeros_like(state.seen)
    return state["document"].gather(1, (state.seen - 1).clamp(min=0)[:, None])[:, 0]


def extend(state: State, new: Slots, ctx: Context) -> tuple[State, Slots]:
    """The state after the real ones of some new tokens, and all slots, those behind a row's last token included."""
    assert state.seen is not None
    leaves = {
        name: append(state[name], getattr(new, name), state.seen, ctx.mask, in_place=ctx.donate_state)
        for name in LEAVES
    }
    return state.replace(**leaves, seen=advanced(state.seen, new.k, ctx)), Slots(**leaves)


def documents(ctx: Context, index_BT: Tensor, current_B: Tensor) -> Tensor:
    """(B, T) index of the first token of each token's document; `current_B` is where the open ones start."""
    start_BT = current_B[:, None].expand_as(index_BT)
    if ctx.reset is None:
        return start_BT
    first_BT = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
    return index_BT.where(first_BT, start_BT).cummax(1).values
