"""Memories: written to and read from, with their own state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altx.capabilities import MemoryCapabilities
from altx.context import Context
from altx.layer import FRESH, Component
from altx.state import State


@dataclass(frozen=True)
class Read:
    """What a memory gives back. At least one field is set.

    Args:
        value: (B, T, D), one vector per query.
        tokens: (B, M, D), extra tokens.
        kv: keys (B, T, R, Dk), values (B, T, R, Dv) and mask (B, T, R) that join an attention's softmax.
    """

    value: Tensor | None = None
    tokens: Tensor | None = None
    kv: tuple[Tensor, Tensor, Tensor | None] | None = None


@dataclass(frozen=True)
class Scan:
    """What `Memory.scan` returns: the reads, the advanced state, unscaled losses and metrics."""

    read: Read
    state: State
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Memory(Component):
    """Something written to and read from.

    `capabilities.chunk` tokens are read and then written (or the other way, see `order`), on a grid that
    starts at the first token of the sequence; a memory of chunk 1 goes token by token.

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

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """Read and write the tokens of x (B, T, D) in order, chunk by chunk.

        A memory may override it with something faster that gives the same result. Losses are averaged
        over real tokens.
        """
        chunk, total = self.capabilities.chunk, x.shape[1]
        # Rows of one batch share the grid, so a memory with chunks is fed rows of equal `seen`.
        start, offset = 0, int(state.seen[0]) if chunk > 1 and state.seen is not None and len(state.seen) else 0
        reads: list[Read] = []
        losses: dict[str, Tensor] = {}
        while start < total:
            stop = min(total, start + chunk - (offset + start) % chunk)
            here, piece = ctx.slice(start, stop), x[:, start:stop]
            if self.capabilities.order == "read-write":
                read, state = self.read(piece, state, here)
                state, new_losses = self.write(piece, state, here)
            else:
                state, new_losses = self.write(piece, state, here)
                read, state = self.read(piece, state, here)
            reads.append(read)
            for name, loss in new_losses.items():
                losses[name] = losses.get(name, torch.zeros_like(loss)) + loss * here.share_of(ctx, piece, x)
            start = stop
        if not reads:
            return Scan(self.read(x, state, ctx)[0], state)
        return Scan(_concatenate(reads), state, losses)


def _concatenate(reads: list[Read]) -> Read:
    """Reads of consecutive chunks as one."""
    values = [read.value for read in reads if read.value is not None]
    tokens = [read.tokens for read in reads if read.tokens is not None]
    kvs = [read.kv for read in reads if read.kv is not None]
    masks = [mask for _, _, mask in kvs if mask is not None]
    joined = (torch.cat([k for k, _, _ in kvs], 1), torch.cat([v for _, v, _ in kvs], 1)) if kvs else None
    return Read(
        torch.cat(values, 1) if values else None,
        torch.cat(tokens, 1) if tokens else None,
        (*joined, torch.cat(masks, 1) if masks else None) if joined else None,
    )
