"""How wide a head is. Never imports torch."""

from __future__ import annotations

from math import gcd
from typing import Annotated, Literal

from pydantic import Field

from altx.config import Config

PUBLISHED = 64
"""Width of a head in all models of RWKV-5, RWKV-6 and RWKV-7."""


class HeadsConfig(Config):
    """What has heads."""

    head_dim: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="width of a head; auto: 64, or else the largest divisor of 64 that divides the model width"
    )
    norm_eps: float = Field(64e-5, gt=0, description="epsilon of the norm of each head's output")

    def heads(self, dim: int) -> int:
        """Number of heads at model width `dim`."""
        return dim // (gcd(dim, PUBLISHED) if self.head_dim == "auto" else self.head_dim)

    def fit(self, dim: int) -> None:
        if self.head_dim != "auto" and dim % self.head_dim:
            raise ValueError(
                f"dim {dim} is not divisible by head_dim {self.head_dim}; use head_dim {gcd(dim, self.head_dim)}, or "
                f"dim {-(-dim // self.head_dim) * self.head_dim}"
            )
