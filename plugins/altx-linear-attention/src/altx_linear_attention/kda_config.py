"""Config of `kda`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.config import Config
from altx_linear_attention.heads import head_width


class KDAConfig(Config):
    """Config of `kda`. The defaults are those of the paper and of its authors' code."""

    heads: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="H, heads; auto: the model width in all, rounded"
    )
    head_dim: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="K, width of a head's keys and values; auto: 128, or the widest of which two fit into dim"
    )
    gate_bias: bool = Field(False, description="a bias on the gate; flash-linear-attention has one, Kimi Linear none")
    short_conv: bool = Field(True, description="short convolutions behind the projections of q, k and v")
    conv_kernel: int = Field(4, gt=0, description="taps of the short convolutions")
    conv_bias: bool = Field(False, description="biases on the short convolutions")
    allow_neg_eigval: bool = Field(False, description="beta up to 2, which lets a state change sign")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the norm of each head's output")

    def sizes(self, dim: int) -> tuple[int, int]:
        """Heads, and their width."""
        width = head_width(dim, 128) if self.head_dim == "auto" else self.head_dim
        return max(round(dim / width), 1) if self.heads == "auto" else self.heads, width
