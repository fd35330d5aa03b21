"""Config of `gla`. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from altx.config import Config
from altx_linear_attention.heads import fit_heads, scaled


class GLAConfig(Config):
    """Config of `gla`. The defaults are those of the paper and of fla."""

    heads: int = Field(4, gt=0, description="H, heads")
    expand_k: float = Field(0.5, gt=0, description="width of queries and keys as a multiple of the model width")
    expand_v: float = Field(1.0, gt=0, description="width of values as a multiple of the model width")
    gate_rank: int = Field(16, gt=0, description="rank of the decay's projection")
    gate_normalizer: float = Field(16.0, gt=0, description="what the logarithm of the decay is divided by")
    gate_min: float | None = Field(None, lt=0, description="no log decay is below this; default: no limit")
    output_gate: bool = Field(True, description="whether silu(W_g x) gates the normed output")
    short_conv: bool = Field(False, description="short convolutions with silu behind the projections of q, k and v")
    conv_kernel: int = Field(4, gt=0, description="taps of the short convolutions")
    conv_bias: bool = Field(False, description="biases on the short convolutions")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the norm of each head's output")

    def fit(self, dim: int) -> None:
        for what in ("expand_k", "expand_v"):
            factor = getattr(self, what)
            fit_heads(scaled(dim, factor, what), self.heads, what=f"{what} * dim =")
