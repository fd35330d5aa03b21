"""Config and capabilities of `knn`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class KNNConfig(Config):
    """Config of `knn`."""

    k: int = Field(32, gt=0, description="keys that each query of each head finds")
    segment: int = Field(
        512, gt=0, description="tokens after which what they wrote can be found, counted from a sequence's first"
    )
    after: int = Field(
        0,
        ge=0,
        description="a token finds only those at least so many before it; the mixer's window, to count none twice",
    )
    size: Annotated[int, Field(gt=0)] | None = Field(
        None, description="tokens of each sequence that can be found, the last of the finished segments; null for all"
    )
    full: Literal["oldest", "error"] = Field(
        "oldest", description="what gives way to a token more than size: the oldest, or the call, with an error"
    )
    gate: bool = Field(
        False, description="mix with the mixer's own attention by a learned share per head (the paper), not one softmax"
    )
    search: Literal["exact", "hnsw"] = Field(
        "exact", description="score every key, or those that a graph of near ones leads to, which may miss some"
    )
    ef: int = Field(128, gt=0, description="keys that a search of the graph keeps in view; more find more, slower")
    block: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="tokens of one graph, and of one file on disk; auto: 65536 with graphs, or 4096"
    )
    path: str | None = Field(
        None, min_length=1, description="directory for keys and values on disk; null for memory, in the state"
    )

    @property
    def block_size(self) -> int:
        """Tokens of a block: of whole segments, as many as make a graph worth while, or a file."""
        if self.block != "auto":
            return self.block
        wanted = 1 << 16 if self.search == "hnsw" else 1 << 12
        return max(wanted // self.segment, 1) * self.segment

    @property
    def in_blocks(self) -> bool:
        """Whether finished blocks are kept as such."""
        return self.search == "hnsw" or self.path is not None

    @property
    def slots(self) -> int | None:
        """Tokens whose keys and values the state has room for; None for all."""
        if self.path is not None:
            return self.block_size
        if self.size is None or self.full == "error":
            return None
        return max(self.size + self.segment, self.block_size if self.in_blocks else 0)

    def fit(self, dim: int) -> None:
        if self.size is not None and self.size < self.k:
            raise ValueError(f"k {self.k} is more than the {self.size} tokens of size; use k {self.size} or less")
        if self.size is None and self.full == "error":
            raise ValueError("full: error needs a size; without one nothing is ever full")
        if self.in_blocks and self.block_size % self.segment:
            near = max(self.block_size // self.segment, 1) * self.segment
            raise ValueError(f"block {self.block} is no multiple of segment {self.segment}; use {near}")
        if self.search == "hnsw" and self.ef < self.k:
            raise ValueError(f"ef {self.ef} is less than k {self.k}; use {self.k} or more")


def capabilities(config: KNNConfig) -> MemoryCapabilities:
    """What is stored is read when its segment has ended, wherever calls are cut."""
    return MemoryCapabilities(
        growth="linear" if config.slots is None else "constant",
        rollback="crop" if config.slots is None and not config.in_blocks else "snapshot",
        chunk=config.segment,
        compiles=False,
    )
