"""The memory of the Compressive Transformer (Rae et al. 2019, arXiv:1911.05507, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH, advanced
from altx.layout import append
from altx.memory import NOTHING, Attended, Memory, Read, attended
from altx.segments import Piece, split
from altx.spec import BuildContext, Heads
from altx.state import Leaf, State
from altx_compressive.config import CompressiveConfig, capabilities

KEPT = Leaf(kind="memory")
COUNTED = Leaf(kind="counter")


class Compressive(Memory):
    """A queue of recent tokens, and one of the slots that what leaves it is compressed to (algorithm 1).

    At the end of each segment its keys and values join the queue of `memory` tokens, the oldest segment leaves it, and
    every `ratio` of its tokens become a slot, to which later tokens attend by content, as the keys have no positions.

    The convolution is trained by attention-reconstruction (algorithm 2): with the queries Q of the segment, the keys
    and values that leave and the slots that they become,

        reconstruction = mean (attention(Q, slots) - attention(Q, leaving))^2

    whose gradient reaches the convolution alone. It is the mean over real tokens, of which those of a segment after
    which nothing was compressed have 0.

    Args:
        config: sizes, and how to compress.
        heads: what an attention hands over.

    Shape: x (B, T, heads.width) to attention (B, T, H, V). State: the keys and values (B, ..., heads.kv * (K + V)) of
    the segment that is open, of recent tokens and of compressed slots, the last ones at the end; with a loss the open
    segment's queries; offset (B,), tokens of the open segment; segments (B,), those that have ended.
    """

    def __init__(self, config: CompressiveConfig, heads: Heads) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        self.heads = heads
        self.asking = heads.query * heads.key_dim
        self.widths = [heads.kv * heads.key_dim, heads.kv * heads.value_dim]
        ratio = config.ratio
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, ratio, stride=ratio) for width in self.widths if config.compression == "conv"
        )

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        config, width = self.config, sum(self.widths)
        sizes = {"open": config.segment, "recent": config.memory, "compressed": config.compressed}
        leaves = {name: torch.zeros(batch, size, width, device=device, dtype=dtype) for name, size in sizes.items()}
        if config.learns:
            leaves["queries"] = torch.zeros(batch, config.segment, self.asking, device=device, dtype=dtype)
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        spec = {**dict.fromkeys(leaves, KEPT), "offset": COUNTED, "segments": COUNTED}
        return State({**leaves, "offset": none, "segments": none}, spec, seen=none)

    def offset(self, state: State) -> list[int]:
        return state["offset"].tolist()

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Attend to what the finished segments left; the state stays. From a reset on, there is nothing."""
        shown = [state["compressed"]]
        there = [self._there(state["segments"], self.config.compressed, self.config.memory, self.config.ratio)]
        if self.config.shown == "all":
            shown.append(state["recent"])
            there.append(self._there(state["segments"], self.config.memory, 0, 1))
        keys, values = self._keys_and_values(torch.cat(shown, 1).to(q.dtype))
        found = attended(self._queries(q), keys[:, None], values[:, None], torch.cat(there, 1)[:, None])
        if ctx.reset is not None:
            begun = (ctx.reset if ctx.mask is None else ctx.reset & ctx.mask).cumsum(1)[..., None] > 0
            found = Attended(found.value.masked_fill(begun[..., None], 0), found.weight.masked_fill(begun, NOTHING))
        return Read(attended=found), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Keep keys and values, and compress when a segment has ended."""
        seen = advanced(state.seen, u, ctx)
        loss = torch.zeros((), device=u.device, dtype=torch.promote_types(u.dtype, torch.float32))
        for piece, part in split(u, ctx, self.offset(state), self.config.segment):
            state, error = self._held(part, state, piece)
            loss = loss + error
        state = state.replace(seen=seen)
        if not self.config.learns:
            return state, {}
        return state, {"reconstruction": loss * self.config.segment / ctx.lengths(u).sum().clamp(min=1)}

    def _held(self, u: Tensor, state: State, piece: Piece) -> tuple[State, Tensor | float]:
        """The state after tokens u (B, n, ...) of one segment of each row, and the sum of the rows' losses."""
        held = dict(state.leaves)
        if any(piece.reset):
            held = {name: x.masked_fill(_rows(piece.reset, x), 0) for name, x in held.items()}
        asked, kept = u.split([self.asking, u.shape[-1] - self.asking], -1)
        for name, new in (("open", kept), ("queries", asked)):
            if name in held:
                # A whole segment needs no place in what is held of one.
                whole = piece.mask is None and new.shape[1] == self.config.segment
                held[name] = new.to(held[name].dtype) if whole else append(held[name], new, held["offset"], piece.mask)
        held["offset"] = torch.tensor(piece.offset, device=u.device)
        error: Tensor | float = 0.0
        if any(piece.last):
            error = self._ended(held, _rows(piece.last, u))
        return state.replace(**held), error

    def _ended(self, held: dict[str, Tensor], ended: Tensor) -> Tensor | float:
        """In the rows where a segment has `ended` (B, 1, 1), move both queues on, in place of what is held.

        Returns:
            The sum of the rows' losses.
        """
        config = self.config
        queue = torch.cat([held["recent"], held["open"]], 1)
        leaving, recent = queue.split([config.segment, config.memory], 1)
        # The queue is empty at first: nothing leaves it before it is full.
        full = ended & (held["segments"] * config.segment >= config.memory)[:, None, None]
        slots = self._compress(leaving)
        compressed = torch.cat([held["compressed"], slots], 1)[:, -config.compressed :]
        error: Tensor | float = 0.0
        if config.learns:
            error = self._lost(held["queries"], leaving, full[:, 0, 0])
            held["queries"] = held["queries"].masked_fill(ended, 0)
        held["compressed"] = torch.where(full, compressed, held["compressed"])
        held["recent"] = torch.where(ended, recent, held["recent"])
        held["open"] = held["open"].masked_fill(ended, 0)
        held["segments"] = held["segments"] + ended[:, 0, 0]
        return error

    def _compress(self, x: Tensor) -> Tensor:
        """Keys and values (B, segment, ...) to slots (B, segment / ratio, ...)."""
        if not self.convolutions:
            grouped: Tensor = x.unflatten(1, (-1, self.config.ratio))
            return grouped.mean(2) if self.config.compression == "mean" else grouped.amax(2)
        windows = x.unflatten(1, (-1, self.config.ratio)).mT.split(self.widths, 2)
        slots = [_strided(conv, part.flatten(2)) for conv, part in zip(self.convolutions, windows, strict=True)]
        return torch.cat(slots, -1).to(x.dtype)

    def _lost(self, queries: Tensor, leaving: Tensor, rows: Tensor) -> Tensor:
        """What attention with the segment's queries (B, segment, ...) misses in the slots: the sum over `rows` (B,)."""
        queries, leaving = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (queries, leaving))
        q = self._queries(queries).transpose(1, 2)
        shared = self.heads.query != self.heads.kv

        def recalled(x: Tensor) -> Tensor:
            keys, values = (each.transpose(1, 2) for each in self._keys_and_values(x))
            return F.scaled_dot_product_attention(q, keys, values, scale=1.0, enable_gqa=shared)

        error = (recalled(self._compress(leaving)) - recalled(leaving)).square().flatten(1).mean(1)
        return error.masked_fill(~rows, 0).sum()

    def _queries(self, x: Tensor) -> Tensor:
        """The first of x (B, T, ...) as (B, T, H, K)."""
        queries: Tensor = x[..., : self.asking].unflatten(-1, (self.heads.query, -1))
        return queries

    def _keys_and_values(self, x: Tensor) -> list[Tensor]:
        """(B, R, G, K) and (B, R, G, V) of what is kept, (B, R, ...)."""
        return [part.unflatten(-1, (self.heads.kv, -1)) for part in x.split(self.widths, -1)]

    def _there(self, segments: Tensor, slots: int, before: int, ratio: int) -> Tensor:
        """Which slots (B, slots) hold something: the last ones, of what is further back than `before` tokens."""
        count = (segments * self.config.segment - before).clamp(min=0) // ratio
        return torch.arange(slots, device=segments.device) >= slots - count[:, None]


def _strided(conv: nn.Module, windows: Tensor) -> Tensor:
    """A convolution of windows (B, n, width * ratio) that do not overlap, which is one product."""
    assert isinstance(conv, nn.Conv1d)
    return F.linear(windows.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)


def _rows(chosen: list[bool], like: Tensor) -> Tensor:
    """Of each row whether it is chosen, to go with a tensor (B, ...)."""
    return torch.tensor(chosen, device=like.device).reshape(-1, *[1] * (like.dim() - 1))


def build(config: CompressiveConfig, ctx: BuildContext) -> Memory:
    assert ctx.heads is not None, "it attaches as kv only"
    return Compressive(config, ctx.heads)
