"""Config of `lightning`. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from altx.config import Config
from altx_linear_attention.config import Auto
from altx_linear_attention.heads import fit_heads, head_width


class LightningConfig(Config):
    """Config of `lightning`. The defaults are those of MiniMax-Text-01."""

    heads: Auto = Field("auto", description="H, heads; auto: 128 wide, or the widest of which two fit")
    head_dim: Auto = Field("auto", description="K, width of a head; auto: model width / H")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norm of the output")

    def count(self, dim: int) -> int:
        """H at model width `dim`."""
        return dim // head_width(dim, 128) if self.heads == "auto" else self.heads

    def width(self, dim: int) -> int:
        """K at model width `dim`."""
        return dim // self.count(dim) if self.head_dim == "auto" else self.head_dim

    def fit(self, dim: int) -> None:
        if self.head_dim == "auto":
            fit_heads(dim, self.count(dim))
