"""Config and capabilities of `recurrent-memory`. Never imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class RecurrentMemoryConfig(Config):
    """Config of `recurrent-memory`."""

    tokens: int = Field(10, gt=0, le=1 << 16, description="memory tokens M")
    segment: int = Field(512, gt=0, le=1 << 30, description="tokens of a segment, the memory's not counted")
    write: Literal["memory", "learned"] = Field(
        "memory", description="what stands after a segment: the memory (the paper), or tokens learned for it"
    )
    position: bool = Field(False, description="add a learned vector to each memory token before a segment")
    norm: Literal["rms", "layer", "none"] = Field("rms", description="norm of what the blocks make of a memory token")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of that norm")


def capabilities(config: RecurrentMemoryConfig) -> MemoryCapabilities:
    """One for the whole stack of blocks; in an encoder, tokens of a segment see each other and the memory before it."""
    return MemoryCapabilities(
        bidirectional=True,
        growth="constant",
        rollback="snapshot",
        chunk=config.segment,
        tokens=2 * config.tokens,
        scope="stack",
    )


class AssociativeConfig(Config):
    """Config of `associative-recurrent-memory`. The defaults are those of the authors' code."""

    tokens: int = Field(16, gt=0, le=1 << 16, description="memory tokens M behind a segment")
    segment: int = Field(512, gt=0, le=1 << 30, description="tokens of a segment, the memory's not counted")
    key_dim: int = Field(64, gt=0, le=1 << 16, description="width of queries and keys, before their features")
    order: int = Field(3, gt=0, description="products of each channel with others, nu: 2 key_dim nu features")
    correction: bool = Field(True, description="count a key that is held already less in the normaliser z")

    def fit(self, dim: int) -> None:
        if self.order >= 2 * self.key_dim:
            raise ValueError(
                f"order {self.order} is not less than 2 key_dim = {2 * self.key_dim}, the channels to multiply with; "
                f"use order {2 * self.key_dim - 1} or less"
            )


def associative_capabilities(config: AssociativeConfig) -> MemoryCapabilities:
    """One for the whole stack of blocks, with a part in each."""
    return MemoryCapabilities(
        bidirectional=True,
        growth="constant",
        rollback="snapshot",
        chunk=config.segment,
        tokens=config.tokens,
        scope="stack",
    )
