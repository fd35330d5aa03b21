"""Config of `retnet`. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from altx.config import Config
from altx_linear_attention.config import Auto
from altx_linear_attention.heads import fit_heads, head_width, scaled


class RetNetConfig(Config):
    """Config of `retnet`. The defaults are those of the paper and of torchscale."""

    heads: Auto = Field("auto", description="H, heads; auto: with keys 256 wide, or the widest of which two fit")
    expand_v: float = Field(2.0, gt=0, description="width of values as a multiple of the model width")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norm of each head's output")

    def count(self, dim: int) -> int:
        """H at model width `dim`."""
        return dim // head_width(dim, 256, even=True) if self.heads == "auto" else self.heads

    def fit(self, dim: int) -> None:
        fit_heads(dim, self.count(dim), unit=2)
        fit_heads(scaled(dim, self.expand_v, "expand_v"), self.count(dim), what="expand_v * dim =")
