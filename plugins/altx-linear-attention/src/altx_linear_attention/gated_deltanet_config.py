"""Config of `gated-deltanet`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.config import Config
from altx_linear_attention.heads import head_width, scaled

Auto = Literal["auto"] | Annotated[int, Field(gt=0)]


class GatedDeltaNetConfig(Config):
    """Config of `gated-deltanet`. The defaults are those of the paper and of its authors' code."""

    heads: Auto = Field("auto", description="H, key heads; auto: 3/4 of the model width in all, rounded")
    head_dim: Auto = Field("auto", description="K, width of a key head; auto: 256, or what fits twice into 3/4 of dim")
    value_heads: Auto = Field("auto", description="value heads, a multiple of H; auto: H")
    expand_v: float = Field(2.0, gt=0, description="V, width of a value head, as a multiple of K")
    output_gate: bool = Field(True, description="whether silu(W_g x) gates the normed output")
    short_conv: bool = Field(True, description="short convolutions behind the projections of q, k and v")
    conv_kernel: int = Field(4, gt=0, description="taps of the short convolutions")
    conv_bias: bool = Field(False, description="biases on the short convolutions")
    allow_neg_eigval: bool = Field(False, description="beta up to 2, which lets a state change sign")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the norm of each head's output")

    def fit(self, dim: int) -> None:
        self.sizes(dim)

    def sizes(self, dim: int) -> tuple[int, int, int, int]:
        """Key heads, their width, value heads, their width.

        Raises:
            ValueError: if they do not fit together.
        """
        keys = max(round(dim * 3 / 4), 1)
        width = head_width(keys, 256) if self.head_dim == "auto" else self.head_dim
        heads = max(round(keys / width), 1) if self.heads == "auto" else self.heads
        value_heads = heads if self.value_heads == "auto" else self.value_heads
        if value_heads % heads:
            raise ValueError(
                f"{value_heads} value heads cannot be shared out to {heads} key heads; "
                f"use value_heads {-(-value_heads // heads) * heads}"
            )
        return heads, width, value_heads, scaled(width, self.expand_v, "expand_v", of="head_dim")
