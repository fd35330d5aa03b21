"""Memories: written to and read from, with their own state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from altx.capabilities import MemoryCapabilities
from altx.context import Context
from altx.layer import FRESH, Component, StateOptions
from altx.segments import Piece, gathered, split
from altx.spec import Heads
from altx.state import State


class Attended(NamedTuple):
    """Attention to the keys and values of a memory alone: all that another softmax needs to know to take them in.

    Args:
        value: (B, T, H, Dv), each query's mean of the values; 0 where there is no key.
        weight: (B, T, H), the logarithm of the sum of exp(score) over the keys, in at least float32; -1e30 for none.
        share: (B, T, H), how much of the output is `value`, where a gate says so and not one softmax of all keys.
    """

    value: Tensor
    weight: Tensor
    share: Tensor | None = None


def attended(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Attended:
    """Each query's attention to the keys and values that a memory holds for it.

    Args:
        q: (B, T, H, Dk), already scaled.
        keys: (B, T, R, N, Dk), or (B, 1, R, N, Dk) for keys that all T queries meet; N divides H, as `Heads.kv` does.
        values: (B, T or 1, R, N, Dv).
        mask: (B, T or 1, R) or (B, T or 1, R, N) bool, True where there is a key; None for everywhere.
    """
    (batch, length, heads, _), (_, each, count, groups, width) = q.shape, values.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    if not count or not length:
        return Attended(
            q.new_zeros(batch, length, heads, width).to(values.dtype),
            torch.full((batch, length, heads), NOTHING, dtype=precise, device=q.device),
        )
    # Queries that meet the same keys are laid beside each other, so that no key is copied: (B, T', N, queries, Dk).
    asking = q.unflatten(2, (groups, -1)).unflatten(1, (each, -1)).transpose(2, 3).flatten(3, 4)
    keys, values = (t.transpose(2, 3) for t in (keys, values))
    score = (asking @ keys.transpose(-1, -2)).to(precise)
    if mask is not None:
        there = mask[..., None] if mask.dim() == 3 else mask
        score = score.masked_fill(~there.transpose(2, 3)[..., None, :], NOTHING)
    weight = torch.logsumexp(score, -1)
    share = (score - weight[..., None]).exp()
    if mask is not None:
        share = share.masked_fill(weight[..., None] <= NOTHING / 2, 0)

    def back(x: Tensor) -> Tensor:
        """(B, T', N, queries, ...) to (B, T, H, ...)."""
        apart: Tensor = x.unflatten(3, (-1, heads // groups)).transpose(2, 3)
        return apart.flatten(3, 4).flatten(1, 2)

    return Attended(back(share.to(values.dtype) @ values), back(weight).clamp(min=NOTHING))


NOTHING = -1e30
"""Logarithm of the weight of no key. Not -inf, whose differences have no gradient."""


def split_heads(x: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """What attention hands to a memory, x (B, T, heads.width): q (B, T, H, Dk), k (B, T, G, Dk), v (B, T, G, Dv)."""
    wide = [heads.query * heads.key_dim, heads.kv * heads.key_dim, heads.kv * heads.value_dim]
    q, k, v = x.split(wide, -1)
    return q.unflatten(-1, (heads.query, -1)), k.unflatten(-1, (heads.kv, -1)), v.unflatten(-1, (heads.kv, -1))


@dataclass(frozen=True)
class Read:
    """What a memory gives back. At least one field is set.

    Args:
        value: (B, T, D), one vector per query.
        tokens: (B, M, D), extra tokens; attached as "tokens", those before a segment.
        after: (B, M', D), those after a segment; what becomes of them is written.
        attended: what joins an attention's softmax (attach mode "kv"); see `attended`.
    """

    value: Tensor | None = None
    tokens: Tensor | None = None
    after: Tensor | None = None
    attended: Attended | None = None


@dataclass(frozen=True)
class Scan:
    """What `Memory.scan` returns: the reads, the advanced state, unscaled losses and metrics."""

    read: Read
    state: State
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """A chunk that was read and written.

    Args:
        cut: where its tokens stand in the call; None for the single tokens of a memory of chunk 1, in order.
        x: its tokens (B, n, D).
        ctx: their context.
        read: what was read.
        state: the memory after it.
        losses: unscaled, times its share of the call's real tokens.
        share: that share, a scalar.
    """

    cut: Piece | None
    x: Tensor
    ctx: Context
    read: Read
    state: State
    losses: Mapping[str, Tensor]
    share: Tensor


class Memory(Component):
    """Something written to and read from.

    `capabilities.chunk` tokens are read and then written (or the other way, see `order`), on a grid that
    starts at the first token of each row's sequence; a memory of chunk 1 goes token by token. What is left of a chunk
    at the end of a call is read and written as it is, and the next call goes on with the rest: a memory that writes
    whole chunks only keeps what it still lacks in its state.

    Attached as "kv", it is built with `BuildContext.heads`, and what it reads and writes is x (B, T, heads.width), of
    which `split_heads` makes queries, keys and values.

    `read` and `write` each honour the context: at a reset a read answers as from an empty memory and a write
    empties it, and neither changes anything at masked tokens. Both take any T, 0 included.
    """

    capabilities: MemoryCapabilities

    @abstractmethod
    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The memory before the first token; arguments as for a layer."""

    @abstractmethod
    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read with queries q (B, T, D). A state comes back too: an address may move by reading."""

    @abstractmethod
    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Write u (B, T, D): the advanced state, with `seen` counted on, and unscaled losses."""

    def enter(self, layer: int, x: Tensor, state: State, ctx: Context = FRESH) -> Tensor:
        """Attached as "tokens": what block `layer` is given in the place of x (B, T, D), other tokens included."""
        return x

    def leave(self, layer: int, u: Tensor, state: State, ctx: Context = FRESH) -> State:
        """Attached as "tokens": told what block `layer` made of the tokens after a segment u (B, M', D), at its end."""
        return state

    def offset(self, state: State) -> list[int]:
        """Tokens of each row's open chunk. A memory with chunks that honours resets counts them itself."""
        return [] if state.seen is None else (state.seen % self.capabilities.chunk).tolist()

    def chunks(self, x: Tensor, state: State, ctx: Context = FRESH) -> Iterator[Chunk]:
        """Read and write the tokens of x (B, T, D) in order, chunk by chunk."""
        chunk = self.capabilities.chunk
        cuts: Iterable[tuple[Piece | None, Tensor, Context]]
        if chunk > 1:
            cuts = ((cut, part, cut.ctx) for cut, part in split(x, ctx, self.offset(state), chunk))
        else:
            cuts = ((None, x[:, t : t + 1], ctx.slice(t, t + 1)) for t in range(x.shape[1]))
        for cut, piece, here in cuts:
            if self.capabilities.order == "read-write":
                read, state = self.read(piece, state, here)
                state, losses = self.write(piece, state, here)
            else:
                state, losses = self.write(piece, state, here)
                read, state = self.read(piece, state, here)
            share = here.share_of(ctx, piece, x)
            yield Chunk(cut, piece, here, read, state, {name: loss * share for name, loss in losses.items()}, share)

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """Read and write the tokens of x (B, T, D) in order, chunk by chunk.

        A memory may override it with something faster that gives the same result. Losses are averaged
        over real tokens.
        """
        done = [*self.chunks(x, state, ctx)]
        if not done:
            # Nothing real has come.
            read = self.read(x[:, :0], state, ctx.slice(0, 0))[0]
            return Scan(_joined([Chunk(None, x, ctx, read, state, {}, x.new_ones(()))], x), state)
        losses: dict[str, Tensor] = {}
        for chunk in done:
            added(losses, chunk.losses)
        return Scan(_joined(done, x), done[-1].state, losses)


class Lookup(Memory):
    """A memory that training writes: a call reads it, and leaves it as it is."""

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State:
        return State()

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        return Read(self.look_up(q)), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        return state, {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """All tokens at once: none sees another."""
        return Scan(Read(self.look_up(x)), state)

    @abstractmethod
    def look_up(self, x: Tensor) -> Tensor:
        """Values (B, T, D) for the tokens x (B, T, D)."""


def added(into: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values to those of the same name."""
    for name, value in values.items():
        into[name] = into.get(name, torch.zeros_like(value)) + value


def put_back(chunks: list[Chunk], each: list[Tensor], x: Tensor) -> Tensor:
    """What came of every chunk of x (B, T, D), each (B, n, ...), where its tokens stand: (B, T, ...)."""
    cuts = [(chunk.cut, y) for chunk, y in zip(chunks, each, strict=True) if chunk.cut]
    if cuts:
        return gathered(cuts, x)
    y = torch.cat(each, 1)
    return y if y.shape[1] else y.new_zeros(len(x), x.shape[1], *y.shape[2:])


def _joined(chunks: list[Chunk], x: Tensor) -> Read:
    """Reads of the chunks of x as one."""
    reads = [chunk.read for chunk in chunks]
    values = [read.value for read in reads if read.value is not None]
    tokens = [read.tokens for read in reads if read.tokens is not None]
    found = [read.attended for read in reads if read.attended is not None]
    shares = [each.share for each in found if each.share is not None]
    return Read(
        put_back(chunks, values, x) if values else None,
        torch.cat(tokens, 1) if tokens else None,
        None,
        Attended(
            put_back(chunks, [each.value for each in found], x),
            put_back(chunks, [each.weight for each in found], x),
            put_back(chunks, shares, x) if shares else None,
        )
        if found
        else None,
    )
