"""Config of `deltanet`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.config import Config
from altx_linear_attention.heads import fit_heads, head_width, scaled


class DeltaNetConfig(Config):
    """Config of `deltanet`. The defaults are those of the paper and of its authors' code."""

    heads: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="H, heads; auto: with keys 128 wide, or the widest of which two fit"
    )
    expand_k: float = Field(1.0, gt=0, description="width of queries and keys as a multiple of the model width")
    expand_v: float = Field(1.0, gt=0, description="width of values as a multiple of the model width")
    qk_activation: Literal["silu", "elu", "relu", "identity"] = Field(
        "silu", description="of queries and keys; elu is elu(x) + 1, as in Schlag et al. 2021"
    )
    qk_norm: Literal["l2", "sum"] = Field(
        "l2", description="queries and keys of length 1, or, as in Schlag et al. 2021, that sum to 1"
    )
    output_gate: bool = Field(False, description="whether silu(W_g x) gates the normed output")
    short_conv: bool = Field(True, description="short convolutions behind the projections of q, k and v")
    conv_kernel: int = Field(4, gt=0, description="taps of the short convolutions")
    conv_bias: bool = Field(False, description="biases on the short convolutions")
    allow_neg_eigval: bool = Field(False, description="beta up to 2, which lets a state change sign")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the norm of each head's output")

    def fit(self, dim: int) -> None:
        self.sizes(dim)

    def sizes(self, dim: int) -> tuple[int, int, int]:
        """Heads, width of their keys, width of their values.

        Raises:
            ValueError: if the widths are not whole heads.
        """
        keys, values = scaled(dim, self.expand_k, "expand_k"), scaled(dim, self.expand_v, "expand_v")
        heads = keys // head_width(keys, 128) if self.heads == "auto" else self.heads
        for width, what in ((keys, "expand_k"), (values, "expand_v")):
            fit_heads(width, heads, what=f"{what} * dim =")
        return heads, keys // heads, values // heads
