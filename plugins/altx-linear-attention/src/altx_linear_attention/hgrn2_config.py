"""Config of `hgrn2`. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from altx.config import Config
from altx_linear_attention.config import Auto
from altx_linear_attention.heads import head_width


class HGRN2Config(Config):
    """Config of `hgrn2`. The defaults are those of the paper's language models and of fla."""

    expand_ratio: Auto = Field(
        "auto", description="K, width of a head and rows of its state; auto: 128, or the widest of which two fit"
    )
    lower_bound: bool = Field(True, description="forget gates have lower bounds, which rise from block to block")
    short_conv: bool = Field(False, description="short convolutions behind the projections of q, forget gate and input")
    conv_kernel: int = Field(4, gt=0, description="taps of the short convolutions")
    conv_bias: bool = Field(False, description="biases on the short convolutions")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the norm of the output")

    def heads(self, dim: int) -> int:
        """H at model width `dim`."""
        return dim // (head_width(dim, 128) if self.expand_ratio == "auto" else self.expand_ratio)

    def fit(self, dim: int) -> None:
        width = self.expand_ratio
        if width == "auto" or dim % width == 0:
            return
        usable = [n for n in range(1, dim + 1) if dim % n == 0]
        near = [n for n in usable if n < width][-1:] + [n for n in usable if n > width][:1]
        raise ValueError(
            f"dim {dim} is not divisible by expand_ratio {width}; "
            f"use expand_ratio {' or '.join(map(str, near))}, or dim {-(-dim // width) * width}"
        )
