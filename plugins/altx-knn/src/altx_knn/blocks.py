"""Blocks of tokens that will not change: each names the one before it, so that forks share what they have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from altx_knn.graph import Graph
from altx_knn.store import ROOT, Store, named, open_store


@dataclass(eq=False)
class Block:
    """Keys and values of one row's tokens, one after another.

    Args:
        keys: (n, G, Dk) on the CPU, or None where the state holds them.
        values: (n, G, Dv), or None.
        graphs: one per head of keys, or empty.
        before: name of the block before it.
        link: that block, where it is at hand.
    """

    keys: Tensor | None
    values: Tensor | None
    graphs: Sequence[Graph]
    before: str
    link: Block | None = field(default=None, repr=False)


class Blocks:
    """The blocks at hand. All of it is made of what states and the store hold, and can be made anew.

    Args:
        ef: what a search of a graph keeps in view; None for no graphs.
        path: where keys and values are on disk, or None.
    """

    def __init__(self, ef: int | None, path: str | None) -> None:
        self.ef = ef
        self.path = path
        self.known: WeakValueDictionary[str, Block] = WeakValueDictionary()
        self.latest: OrderedDict[str, Block] = OrderedDict()

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of a model begins with none at hand."""
        return Blocks, (self.ef, self.path)

    @cached_property
    def store(self) -> Store | None:
        """On disk, opened when it is first used."""
        return None if self.path is None else open_store(self.path)

    def seal(self, last: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Put a block of keys (n, G, Dk) and values (n, G, Dv) after another one.

        Args:
            last: (3,) the leaf of the state that says which.

        Returns:
            The same of the new one.
        """
        keys, values = keys.detach().cpu().contiguous(), values.detach().cpu().contiguous()
        before, new = named(last.tolist()), fingerprint(last, keys, values)
        name = named(new.tolist())
        block = self.known.get(name)
        if block is None:
            if self.store:
                graphs = self._graphs(keys)
                self.store.put(name, before, keys, values, [graph.saved() for graph in graphs])
                block = self._read(name)
            else:
                block = Block(None, None, self._graphs(keys), before)
            block.link = self.known.get(before)
            self.known[name] = block
        self.latest[name] = block
        return new

    def chain(self, last: Sequence[float], count: int, rebuild: Callable[[], Sequence[Tensor]]) -> list[Block]:
        """The last `count` blocks up to the one that `last` names, in order.

        Args:
            rebuild: the keys of those blocks, each (n, G, Dk), for when they are not at hand and not on disk.
        """
        if not count:
            return []
        name = named(last)
        found = [*self._walk(name, count)]
        if len(found) < count:
            found = []
            for keys in rebuild():
                found.insert(0, Block(None, None, self._graphs(keys), ROOT, found[0] if found else None))
            self.known[name] = found[0]
        # Nothing goes further back: the oldest leave a memory of limited size. A fork that does finds it anew.
        found[-1].link = None
        self.latest[name] = found[0]
        self.latest.move_to_end(name)
        return found[::-1]

    def keep(self, rows: int) -> None:
        """Let go of all but the latest, for a batch of so many rows."""
        while len(self.latest) > 2 * rows:
            self.latest.popitem(last=False)

    def _walk(self, name: str, count: int) -> Iterator[Block]:
        """Up to `count` blocks from this one back."""
        block = self._found(name)
        while block is not None and count:
            yield block
            count -= 1
            if count:
                block.link = block.link or self._found(block.before)
                block = block.link

    def _found(self, name: str) -> Block | None:
        """A block at hand or on disk."""
        block = self.known.get(name)
        if block is None and self.store:
            block = self.known[name] = self._read(name)
        return block

    def _read(self, name: str) -> Block:
        """A block from disk."""
        assert self.store is not None
        before, keys, values, saved = self.store.get(name)
        if self.ef is None or not saved:
            return Block(keys, values, self._graphs(keys), before)
        return Block(keys, values, [Graph.view(graph, self.ef) for graph in saved], before)

    def _graphs(self, keys: Tensor) -> list[Graph]:
        return [] if self.ef is None else [Graph.of(head, self.ef) for head in keys.unbind(1)]


def fingerprint(last: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What names a block (3,), float64: its number, counted from 1, and two sums over all that is in it and before it.

    Sums and no digest of bits, because it is part of a state: states of one sequence agree to rounding, however the
    calls were cut. Blocks that differ in a single bit have different sums all the same, and so different names.
    """
    generator, sums = torch.Generator().manual_seed(0), last[1:].cpu()
    for tensor in (keys, values):
        rows = tensor.flatten(1).double().nan_to_num()
        left, right = (torch.rand(n, 2, generator=generator, dtype=torch.float64) - 0.5 for n in rows.shape)
        sums = sums + (left * (rows @ right)).sum(0)
    return torch.cat([last[:1].cpu() + 1, sums]).to(last.device)
