"""Config of `retnet`. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from altx.config import Config
from altx_linear_attention.heads import fit_heads, head_width, scaled


class RetNetConfig(Config):
    """Config of `retnet`. The defaults are those of the paper and of torchscale."""

    heads: int | None = Field(
        None, gt=0, description="H, heads; default: heads with 256 key channels, or two or more narrower ones"
    )
    expand_v: float = Field(2.0, gt=0, description="width of values as a multiple of the model width")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norm of each head's output")

    def count(self, dim: int) -> int:
        """H at model width `dim`."""
        return self.heads or dim // head_width(dim, 256, even=True)

    def fit(self, dim: int) -> None:
        fit_heads(dim, self.count(dim), unit=2)
        fit_heads(scaled(dim, self.expand_v, "expand_v"), self.count(dim), what="expand_v * dim =")
