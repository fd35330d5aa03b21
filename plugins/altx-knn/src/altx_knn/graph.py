"""Graphs of near keys (Malkov & Yashunin 2018, arXiv:1603.09320), by usearch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from usearch.index import Index, Matches

CONNECTIVITY = 16
EXPANSION_ADD = 128


class Graph:
    """The keys of one head in one block, which it holds in float32; it proposes, and never says what a score is.

    One thread builds it: with more, the graph would depend on their race, and a sequence on how it was cut.

    Args:
        index: of usearch.
        held: what `index` looks at without owning it.
    """

    def __init__(self, index: Index, held: object = None) -> None:
        self.index = index
        self.held = held

    @classmethod
    def of(cls, keys: Tensor, ef: int) -> Graph:
        """Of keys (n, D); a search keeps `ef` of them in view."""
        index = Index(
            ndim=keys.shape[1],
            metric="ip",
            dtype="f32",
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=ef,
        )
        index.add(np.arange(len(keys), dtype=np.uint64), _single(keys), threads=1)
        return cls(index)

    @classmethod
    def view(cls, saved: Tensor, ef: int) -> Graph:
        """What `saved` gave, without a copy of it."""
        held = saved.numpy().data
        index = Index.restore(held, view=True, expansion_search=ef)
        if index is None:
            raise ValueError("no graph of usearch")
        return cls(index, held)

    def saved(self) -> Tensor:
        """(bytes,) uint8."""
        return torch.frombuffer(bytearray(self.index.save() or b""), dtype=torch.uint8)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Places (Q, k) int64 of the keys with the largest products with queries (Q, D), -1 where fewer were found."""
        found = self.index.search(_single(queries), k, threads=torch.get_num_threads())
        places = torch.full((len(queries), k), -1)
        if isinstance(found, Matches):  # of one query, as many as there are
            places[0, : len(found.keys)] = torch.from_numpy(found.keys.astype(np.int64))
            return places
        counts = torch.from_numpy(found.counts.astype(np.int64))
        there = torch.arange(k) < counts[:, None]
        return torch.where(there, torch.from_numpy(found.keys.astype(np.int64)), places)


def _single(x: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = np.ascontiguousarray(x.detach().float().cpu().numpy())
    return array
