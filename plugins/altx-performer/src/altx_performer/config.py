"""Config and capabilities of `performer`. Never imports torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from altx.capabilities import Capabilities
from altx.config import Config

HEAD_DIM, NARROWEST = 64, 8
"""Width of a head by default, and the least that narrow models make of it."""


class PerformerConfig(Config):
    """Config of `performer`. The defaults are those of performer-pytorch, and of the paper where it gives any."""

    heads: int = Field(8, gt=0, description="H, heads")
    head_dim: int | None = Field(
        None, gt=0, description="d, width of a head; default: 64, or dim / heads where that is less, but not below 8"
    )
    features: int | None = Field(None, gt=1, description="F, random features of a head; default: d ln(d), rounded down")
    kernel: Literal["softmax", "relu"] = Field(
        "softmax",
        description="softmax: positive features, an unbiased estimate of softmax attention; relu: W x, cut off",
    )
    redraw_interval: int | None = Field(
        1000, gt=0, description="draw new features every so many optimizer steps; null: keep those of the start"
    )
    feature_norm: Literal["gaussian", "constant"] = Field(
        "gaussian", description="lengths of the rows of W: those of Gaussian vectors (unbiased), or all sqrt(d)"
    )
    relu_eps: float = Field(1e-3, gt=0, description="what the relu kernel adds to every feature")
    qkv_bias: bool = Field(False, description="biases on the projections of queries, keys and values")
    out_bias: bool = Field(True, description="bias on the projection out")
    seed: int = Field(0, ge=0, description="together with layer and step it determines the features that are redrawn")

    def width(self, dim: int) -> int:
        """Width of a head at model width `dim`."""
        return self.head_dim or min(HEAD_DIM, max(dim // self.heads, NARROWEST))

    def count(self, dim: int) -> int:
        """Random features of a head at model width `dim`."""
        width = self.width(dim)
        return self.features or int(width * math.log(width))

    def fit(self, dim: int) -> None:
        if self.count(dim) < 2:
            raise ValueError(
                f"head_dim {self.width(dim)} makes {self.count(dim)} features, and with fewer than 2 all keys look "
                "alike; use head_dim 3 or more, or set features"
            )


def capabilities(config: PerformerConfig) -> Capabilities:
    """A recurrence of constant state that also looks both ways; altx unpacks packed batches for it."""
    return Capabilities(bidirectional=True, growth="constant", rollback="snapshot")
