"""Config and capabilities of `hopfield`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class HopfieldConfig(Config):
    """Config of `hopfield`."""

    patterns: int = Field(256, gt=0, description="learned patterns N")
    heads: int = Field(1, gt=0, description="heads, each with an association space of its own")
    head_dim: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="width of a head's association space; auto: model width / heads"
    )
    beta: float | None = Field(
        None, gt=0, description="inverse temperature: the higher, the fewer patterns mix; none: 1 / sqrt(head_dim)"
    )
    updates: int = Field(1, gt=0, description="updates of a token's state; the last one reads the values")
    separate_values: bool = Field(False, description="whether values are patterns of their own, not those of the keys")
    bias: bool = Field(True, description="whether the projections have biases")

    def width(self, dim: int) -> int:
        """Width of a head's association space at model width D."""
        return dim // self.heads if self.head_dim == "auto" else self.head_dim

    def fit(self, dim: int) -> None:
        if self.head_dim == "auto" and dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width; use a divisor of {dim}, or give head_dim")


def capabilities(config: HopfieldConfig) -> MemoryCapabilities:
    """Everything is honoured, because no token sees another and nothing is carried."""
    return MemoryCapabilities(bidirectional=True, packing=True)
