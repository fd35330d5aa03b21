"""Config of `lightning`. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from altx.config import Config
from altx_linear_attention.heads import fit_heads, head_width


class LightningConfig(Config):
    """Config of `lightning`. The defaults are those of MiniMax-Text-01."""

    heads: int | None = Field(
        None, gt=0, description="H, heads; default: heads of 128 channels, or two or more narrower ones"
    )
    head_dim: int | None = Field(None, gt=0, description="K, width of a head; default: model width / H")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norm of the output")

    def count(self, dim: int) -> int:
        """H at model width `dim`."""
        return self.heads or dim // head_width(dim, 128)

    def width(self, dim: int) -> int:
        """K at model width `dim`."""
        return self.head_dim or dim // self.count(dim)

    def fit(self, dim: int) -> None:
        if self.head_dim is None:
            fit_heads(dim, self.count(dim))
