"""Tokens sorted by bucket: in what order they are attended to, and what each may see of its window.

P pairs of row and head, T tokens, R rounds, L = T brought to a multiple of the block, S slots, m chunk size.

A pair's slots are its rounds one after another, in each of them the tokens sorted by bucket and, within a bucket, by
position. A query sees a part of the window that ends with its own block of slots and begins m slots before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NOWHERE = 2**62
"""Sort key of a token that is not real: behind all others."""


@dataclass(frozen=True)
class Order:
    """An order of tokens in slots, cut into blocks.

    Args:
        tokens: (P, S) int64, which token is in a slot; -1 in an empty one. S is a multiple of block.
        slots: (P, T, R) int64, where a token's own slot of a round is: one that asks as well as answers.
        asks: (P, S) bool, slots whose query counts; the others only answer.
        low: (P, S) int64, slot before which a query sees nothing, or None if it sees its whole window.
        kind: (P, S) int64, only slots of one kind see each other, or None.
        block: queries of a block.
        reach: m, slots in front of its block that a window holds.
        band: a query sees the `reach` slots in front of it and none behind, whatever its block's window holds.
        echo: how many slots at the start of each round are copies of others, which answer and do not ask.
        turn: blocks of a round; where it begins with a copy, its second block sees that.
        full: every query sees its whole window.
        causal: a query sees no later token; where slots are in order of time anyway (`band`), false.
    """

    tokens: Tensor
    slots: Tensor
    asks: Tensor
    low: Tensor | None
    kind: Tensor | None
    block: int
    reach: int
    band: bool
    echo: int
    turn: int
    full: bool
    causal: bool


def _sorted(keys_PRT: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in order, the tokens that they belong to (-1: none), both (P, R, L), and (P, T, R) where each token went."""
    length = keys_PRT.shape[-1]
    keys, tokens = keys_PRT.sort(dim=-1, stable=True)
    place = torch.empty_like(tokens).scatter_(-1, tokens, torch.arange(length, device=keys.device).expand_as(tokens))
    extra = -length % block
    keys, tokens = F.pad(keys, (0, extra), value=NOWHERE), F.pad(tokens, (0, extra), value=-1)
    return keys, tokens.masked_fill(keys == NOWHERE, -1), place.transpose(1, 2)


def within_buckets(keys_PRT: Tensor, reach: int, block: int) -> Order:
    """A token sees the last `reach` tokens before it in its bucket: no later token can change that.

    Args:
        keys_PRT: the bucket of each token, the same number in no two sequences; NOWHERE where a token is not real.
        reach: how many of a bucket it sees.
        block: a divisor of `reach`.
    """
    keys, tokens, place = _sorted(keys_PRT, block)
    rounds, padded = keys.shape[1:]
    slot = torch.arange(padded, device=keys.device)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[..., 1:] = keys[..., 1:] != keys[..., :-1]
    low = slot.expand_as(keys).where(first, 0).cummax(-1).values
    start = torch.arange(rounds, device=keys.device) * padded
    return Order(
        tokens=tokens.flatten(1),
        slots=place + start,
        asks=tokens.flatten(1) >= 0,
        low=(low + start[:, None]).flatten(1),
        kind=None,
        block=block,
        reach=reach,
        band=True,
        echo=0,
        turn=padded // block,
        full=False,
        causal=False,
    )


def in_chunks(keys_PRT: Tensor, lengths_P: Tensor, reach: int, *, across: bool, causal: bool, masked: bool) -> Order:
    """The published order: chunks of `reach` slots, each of which sees itself and the chunk before it, in a circle.

    The first chunk of a round sees the last of the round before (of the last round, if it is the first), as in the
    authors' code and its successors. Tokens that are not real stand behind all others and in no chunk that is seen, so
    that a row is what it would be alone.

    Args:
        keys_PRT: the bucket of each token; NOWHERE where it is not real.
        lengths_P: real tokens of each pair.
        reach: m.
        across: whether a token sees tokens of other buckets in these chunks.
        causal: whether it sees earlier tokens only.
        masked: whether some token may be not real.
    """
    keys, tokens, place = _sorted(keys_PRT, reach)
    rounds, padded = keys.shape[1:]
    last = (lengths_P - 1).clamp(min=0) // reach * reach
    column = (last[:, None] + torch.arange(reach, device=keys.device))[:, None].expand(-1, rounds, -1)
    # In front of each round a copy of the chunk before its first, whose queries are not asked.
    tokens = torch.cat([tokens.roll(1, 1).gather(2, column), tokens], 2)
    kind = None
    if not across:
        count = torch.arange(rounds, device=keys.device)[:, None]
        unique = torch.where(keys == NOWHERE, -1, keys * rounds + count)
        kind = torch.cat([unique.roll(1, 1).gather(2, column), unique], 2).flatten(1)
    asks = tokens >= 0
    asks[..., :reach] = False
    start = torch.arange(rounds, device=keys.device) * (reach + padded) + reach
    return Order(
        tokens=tokens.flatten(1),
        slots=place + start,
        asks=asks.flatten(1),
        low=None,
        kind=kind,
        block=reach,
        reach=reach,
        band=False,
        echo=reach,
        turn=padded // reach + 1,
        full=not masked and not causal and across and padded == keys_PRT.shape[-1],
        causal=causal,
    )
