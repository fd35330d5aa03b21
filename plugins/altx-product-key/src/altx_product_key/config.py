"""Configs and capabilities of the memories."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class LookupConfig(Config):
    """Shared by both."""

    published: ClassVar[int]
    """Keys of each half in the published models."""

    keys: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto",
        description="keys N of each half, for N^2 values; auto: the model width, from topk to the published number",
    )
    heads: int = Field(4, gt=0, description="heads that read, each with keys of its own")
    topk: int = Field(32, gt=0, description="values k that each head reads for a token")
    value_lr: float | None = Field(
        1e-3, gt=0, description="learning rate of the values, whatever the model's; none: the model's"
    )

    def halves(self, dim: int) -> int:
        """Keys N of each half at model width D."""
        return min(max(dim, self.topk), max(self.published, self.topk)) if self.keys == "auto" else self.keys

    def fit(self, dim: int) -> None:
        if self.topk > self.halves(dim):
            raise ValueError(
                f"topk {self.topk} is more than the {self.halves(dim)} keys of each half, among which it is chosen; "
                f"use a topk of at most {self.halves(dim)}, or at least {self.topk} keys"
            )


class ProductKeyConfig(LookupConfig):
    """Config of `product-key`."""

    published: ClassVar[int] = 512

    key_dim: int = Field(128, gt=0, description="width of half a query and of half a key")
    query_norm: Literal["layer", "none"] = Field("layer", description="norm of each half of a query")
    weights: Literal["softmax", "relu"] = Field(
        "softmax", description="what makes weights of scores; relu: values do not compete"
    )


class MemoryLayerConfig(LookupConfig):
    """Config of `memory-layer`."""

    published: ClassVar[int] = 1024

    key_dim: int = Field(256, gt=0, description="width of half a query and of half a key")
    value_dim: int | None = Field(None, gt=0, description="width of a value; none: the model's")
    projection: Literal["gated", "linear", "none"] = Field(
        "gated", description="after the values: W (m * silu(V x)), W m, or m itself"
    )
    output_gate: bool = Field(False, description="whether y is weighed by sigmoid(w x), a number for each token")
    share_values: bool = Field(True, description="whether all such layers of a model read one table")

    def fit(self, dim: int) -> None:
        super().fit(dim)
        if self.projection == "none" and self.value_dim not in (None, dim):
            raise ValueError(
                f"without a projection its values are the output, so value_dim must be the width {dim}, "
                f"not {self.value_dim}; leave it out, or use the projection gated or linear"
            )


def capabilities(config: LookupConfig) -> MemoryCapabilities:
    """Everything is honoured, because no token sees another and nothing is carried."""
    return MemoryCapabilities(bidirectional=True, packing=True)
