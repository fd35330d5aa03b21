"""The memory of Memorizing Transformers (Wu et al. 2022, arXiv:2203.08913).

B rows, T tokens, S slots, H heads that ask, G heads of keys and values. A token's place is its number in its sequence,
counted from 0; a reset starts a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.errors import StateError
from altx.layer import FRESH
from altx.memory import Attended, Memory, Read, Scan, attended, split_heads
from altx.segments import Piece, pieces
from altx.spec import BuildContext, Heads
from altx.state import Leaf, State
from altx_knn.blocks import Block, Blocks
from altx_knn.config import KNNConfig, capabilities
from altx_knn.held import Held
from altx_knn.search import NOWHERE, Nearest, best

WORK = 1 << 24
"""Scores that an exact search holds at a time."""


class KNN(Memory):
    """Keys and values of finished segments, of which each query of each head finds the k with the largest products.

    Args:
        config: how many, of which, and where they are.
        heads: what the attention hands over.

    State: keys (B, S, G, Dk), values (B, S, G, Dv) and document (B, S) int64, where the sequence of the slot's token
    starts; the n-th token of a row is in slot n % S. With a graph or on disk also last (B, 3) float64, which names
    the last finished block. On disk S is that of one block.
    """

    def __init__(self, config: KNNConfig, heads: Heads) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.capabilities = capabilities(config)
        self.gate = nn.Parameter(torch.zeros(heads.query)) if config.gate else None
        ef = config.ef if config.search == "hnsw" else None
        self.blocks = Blocks(ef, config.path) if config.in_blocks else None

    def param_groups(self) -> dict[str, dict[str, Any]]:
        """The gate is a bias: no decay."""
        return {} if self.gate is None else {"gate": {"weight_decay": 0.0}}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        if self.blocks is not None:
            _ = self.blocks.store  # A directory that is no store is said so before the first token.
        heads, grows = self.heads, self.config.slots is None
        room = batch, (capacity or 0) if self.config.slots is None else self.config.slots
        slot = Leaf(seq_dim=1 if grows else None, kind="kv")
        leaves = {
            "keys": torch.zeros(*room, heads.kv, heads.key_dim, device=device, dtype=dtype),
            "values": torch.zeros(*room, heads.kv, heads.value_dim, device=device, dtype=dtype),
            "document": torch.zeros(room, device=device, dtype=torch.int64),
        }
        spec = dict.fromkeys(leaves, slot)
        if self.blocks is not None:
            leaves["last"] = torch.zeros(batch, 3, device=device, dtype=torch.float64)
            spec["last"] = Leaf(kind="external", fp32=True)
        return State(leaves, spec, seen=torch.zeros(batch, device=device, dtype=torch.int64))

    def offset(self, state: State) -> list[int]:
        return (Held.of(state, self.config).count % self.config.segment).tolist()

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """What T queries find of what is held; nothing from a reset on."""
        self._fits(q, state)
        queries = split_heads(q, self.heads)[0]
        held = Held.of(state, self.config)
        if not queries.numel() or not bool((held.done > held.oldest).any()):
            return Read(attended=self._gated(self._none(queries))), state
        with torch.no_grad():
            place = ctx.ranks(q, state.seen) - held.first[:, None]
            limit = place - self.config.after
            if ctx.reset is not None:
                fresh = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
                limit = limit.masked_fill(fresh.cumsum(1) > 0, NOWHERE)
            chains = self._chains(held, state)
            found = self._search(queries.detach(), limit, held, chains)
            keys, values = self._fetch(found.place, held, chains)
        there = (found.place != NOWHERE).transpose(2, 3)
        keys, values = (t.to(q.dtype).transpose(2, 3) for t in (keys, values))
        return Read(attended=self._gated(attended(queries, keys, values, there))), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        self._fits(u, state)
        state = self._owned(state, u, ctx)
        for piece in pieces(u, ctx, self.offset(state), self.config.segment):
            _, k, v = split_heads(piece.take(u).detach(), self.heads)
            state = self._append(k, v, state, piece)
        return state, {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """The loop of reads and writes, on one copy of the state."""
        self._fits(x, state)
        return super().scan(x, self._owned(state, x, ctx), ctx.replace(donate_state=True))

    def _owned(self, state: State, x: Tensor, ctx: Context) -> State:
        """The state with room for the tokens of x, to be written to: a copy, unless it is given up."""
        assert state.seen is not None
        held = slots = state["keys"].shape[1]
        if self.config.slots is None and len(x):
            slots = max(held, int((state.seen + ctx.lengths(x)).max()))
        if ctx.donate_state and slots == held:
            return state

        def copied(leaf: Tensor) -> Tensor:
            return torch.cat([leaf, leaf.new_zeros(len(leaf), slots - held, *leaf.shape[2:])], 1)

        return state.replace(**{name: copied(state[name]) for name in ("keys", "values", "document")})

    def _append(self, k: Tensor, v: Tensor, state: State, piece: Piece) -> State:
        """The state after a piece of segments, whose keys and values are written into it."""
        assert state.seen is not None
        held = Held.of(state, self.config)
        new = k.new_ones(k.shape[:2], dtype=torch.bool) if piece.mask is None else piece.mask
        reset = torch.tensor(piece.reset, device=k.device)
        first = state.seen.where(reset, held.first)
        after = state.seen + new.sum(1)
        self._room(after - first)
        rows, at = new.nonzero(as_tuple=True)
        slot = (state.seen[:, None] + new.cumsum(1) - 1)[rows, at] % max(held.slots, 1)
        for name, value in {"keys": k, "values": v, "document": first[:, None].expand(k.shape[:2])}.items():
            state[name][rows, slot] = value[rows, at].to(state[name].dtype)
        state = state.replace(seen=after)
        return state if self.blocks is None else self._seal(state, reset, new.any(1).tolist())

    def _seal(self, state: State, reset: Tensor, wrote: Sequence[bool]) -> State:
        """The state, with the blocks that were just filled."""
        assert self.blocks is not None
        held, last = Held.of(state, self.config), state["last"].masked_fill(reset[:, None], 0)
        ends = [count > 0 and count % self.config.block_size == 0 for count in held.count.tolist()]
        for row in [row for row, (end, new) in enumerate(zip(ends, wrote, strict=True)) if end and new]:
            place = held.sealed[row] - self.config.block_size + torch.arange(self.config.block_size, device=last.device)
            keys, values = (state[name][row, held.slot(row, place)] for name in ("keys", "values"))
            last[row] = self.blocks.seal(last[row], keys, values)
        self.blocks.keep(len(last))
        return state.replace(last=last)

    def _chains(self, held: Held, state: State) -> list[list[Block]]:
        """Each row's finished blocks from number `held.lowest` on."""
        if self.blocks is None:
            return [[] for _ in held.lowest]
        chains, size = [], self.config.block_size
        rows = zip(state["last"].tolist(), held.lowest, (held.sealed // size).tolist(), strict=True)
        for row, (last, low, high) in enumerate(rows):

            def keys(row: int = row, numbers: range = range(low, high)) -> list[Tensor]:
                step = torch.arange(size, device=held.keys.device)
                return [held.keys[row, held.slot(row, number * size + step)].cpu() for number in numbers]

            chain = self.blocks.chain(last, high - low, keys)
            for block in chain:
                self._suits(block)
            chains.append(chain)
        self.blocks.keep(len(chains))
        return chains

    def _search(self, q: Tensor, limit: Tensor, held: Held, chains: list[list[Block]]) -> Nearest:
        """Places of the nearest keys. limit: (B, T), the last place that each query may find."""
        found, k = Nearest.none(q), self.config.k
        for keys, place, counts in self._exact(q, held, chains):
            near = place[:, None] <= limit[..., None] if self.config.after else limit[..., None] >= 0
            found = found.among(*best(q, keys, place, counts[:, None] & near, k), k)
        if self.config.search == "hnsw":
            for number in range(max((len(chain) for chain in chains), default=0)):
                proposed = self._proposed(q, held, chains, number)
                if proposed is not None:
                    # Only the exact product is a score: a graph's is of float32, whatever the layer's.
                    proposed = proposed.masked_fill(limit[..., None, None] < 0, NOWHERE)
                    keys, _ = self._fetch(proposed, held, chains, values=False)
                    score = (q[..., None, :] * keys.to(q.dtype)).sum(-1).masked_fill(proposed < 0, -torch.inf)
                    found = found.among(score, proposed, k)
        return found

    def _exact(self, q: Tensor, held: Held, chains: list[list[Block]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Keys to be scored one by one: (B, n, G, D), their places (B, n), and whether they count (B, n)."""
        low, high = held.graphed
        at_a_time = max(1024, WORK // q[..., 0].numel())
        for start in range(0, held.used, at_a_time):
            stop = min(start + at_a_time, held.used)
            place = held.place(start, stop)
            counts = (place >= held.oldest[:, None]) & (place < held.done[:, None])
            if self.config.path is not None:
                counts &= place >= held.sealed[:, None]
            counts &= (place < low[:, None]) | (place >= high[:, None])
            if bool(counts.any()):
                yield held.keys[:, start:stop], place, counts
        if self.config.path is None:
            return
        for number in range(max((len(chain) for chain in chains), default=0)):
            step = torch.arange(self.config.block_size, device=q.device)
            place = (torch.tensor(held.lowest, device=q.device) + number)[:, None] * self.config.block_size + step
            counts = (place >= held.oldest[:, None]) & (place < held.sealed[:, None])
            counts &= (place < low[:, None]) | (place >= high[:, None])
            if bool(counts.any()):
                none = held.keys.new_zeros(self.config.block_size, *held.keys.shape[2:])
                keys = [
                    chain[number].keys if number < len(chain) and there else None
                    for chain, there in zip(chains, counts.any(1).tolist(), strict=True)
                ]
                yield torch.stack([none if key is None else key.to(none) for key in keys]), place, counts

    def _proposed(self, q: Tensor, held: Held, chains: list[list[Block]], number: int) -> Tensor | None:
        """Places (B, T, H, k) that the graphs of each row's block propose, NOWHERE for none."""
        k, size = min(self.config.k, self.config.block_size), self.config.block_size
        place = torch.full((*q.shape[:3], k), NOWHERE, device=q.device)
        found = False
        low, high = (bound.tolist() for bound in held.graphed)
        each = self.heads.query // self.heads.kv
        for row, chain in enumerate(chains):
            start = (held.lowest[row] + number) * size
            if number >= len(chain) or not low[row] <= start < high[row]:
                continue
            found = True
            for group, graph in enumerate(chain[number].graphs):
                asking = q[row, :, group * each : (group + 1) * each].flatten(0, 1)
                local = graph.search(asking, k).to(q.device)
                wide = torch.where(local < 0, NOWHERE, local + start).unflatten(0, (-1, each))
                place[row, :, group * each : (group + 1) * each] = wide
        return place if found else None

    def _fetch(
        self, place: Tensor, held: Held, chains: list[list[Block]], *, values: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, H, k, D) of the tokens at place (B, T, H, k); of no use where that is NOWHERE."""
        row = torch.arange(len(place), device=place.device)[:, None, None, None]
        group = torch.arange(self.heads.query, device=place.device) // (self.heads.query // self.heads.kv)
        slot = (held.first[:, None, None, None] + place.clamp(min=0)) % held.slots
        found = [leaf[row, slot, group[:, None]] for leaf in (held.keys, held.values)[: 1 + values]]
        if self.config.path is not None:
            for number, chain in enumerate(chains):
                for at, block in enumerate(chain, held.lowest[number]):
                    here = place[number] // self.config.block_size == at
                    here &= place[number] >= 0
                    _, heads, _ = hits = here.nonzero(as_tuple=True)
                    if len(heads):
                        inside = (place[number][hits] % self.config.block_size).cpu()
                        for leaf, stored in zip(found, (block.keys, block.values), strict=False):
                            assert stored is not None
                            leaf[number][hits] = stored[inside, group[heads].cpu()].to(leaf)
        return found[0], found[-1]

    def _none(self, q: Tensor) -> Attended:
        empty = (q.new_zeros(len(q), 1, 0, self.heads.kv, dim) for dim in (self.heads.key_dim, self.heads.value_dim))
        return attended(q, *empty)

    def _gated(self, found: Attended) -> Attended:
        """With the learned share, where one was asked for (section 3.2); none of it where nothing was found."""
        if self.gate is None:
            return found
        share = torch.sigmoid(self.gate.to(found.weight.dtype))
        return found._replace(share=share.where(found.weight > -1e29, 0))

    def _fits(self, x: Tensor, state: State) -> None:
        """Refuse a state of another batch, other heads or another size."""
        found = *state["keys"].shape, state["values"].shape[-1]
        slots = self.config.slots or found[1]
        wanted = len(x), slots, self.heads.kv, self.heads.key_dim, self.heads.value_dim
        if found != wanted:
            names = ("rows", "slots", "heads of keys", "numbers in a key", "numbers in a value")
            wrong = [f"{a} {n}, not {b}" for a, b, n in zip(found, wanted, names, strict=True) if a != b]
            raise StateError(
                f"altx-knn: the state has {'; '.join(wrong)}", hint="use the state of this batch and model"
            )

    def _suits(self, block: Block) -> None:
        """Refuse a block on disk of another size or other heads."""
        if block.keys is None or block.values is None:
            return
        found = tuple(block.keys.shape), tuple(block.values.shape)
        size, heads = self.config.block_size, self.heads
        wanted = (size, heads.kv, heads.key_dim), (size, heads.kv, heads.value_dim)
        if found != wanted:
            raise StateError(
                f"altx-knn: the store {self.config.path} holds keys {found[0]} and values {found[1]} where this model "
                f"has {wanted[0]} and {wanted[1]}: tokens of a block, heads, numbers",
                hint="use the config with which it was written, or begin with a new state",
            )

    def _room(self, count: Tensor) -> None:
        if self.config.full == "error" and self.config.size is not None and bool((count > self.config.size).any()):
            rows = (count > self.config.size).nonzero().flatten().tolist()
            raise StateError(
                f"altx-knn: the store is full: size is {self.config.size} tokens, and row {rows[0]} has more",
                hint="raise size, let the oldest leave (full: oldest), or start a sequence anew (ctx.reset)",
            )


def build(config: KNNConfig, ctx: BuildContext) -> KNN:
    if ctx.heads is None:
        raise TypeError("knn is attached as kv, to an attention that says what it hands over")
    return KNN(config, ctx.heads)
