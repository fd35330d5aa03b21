"""Config of `mlstm`. Never imports torch."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from altx.config import Config
from altx_linear_attention.config import Auto
from altx_linear_attention.heads import fit_heads, scaled

Positive = Annotated[float, Field(gt=0)]
UNIT = 64
"""What the inner width of a pre-up block is rounded up to a multiple of."""


class MLSTMConfig(Config):
    """Config of `mlstm`. The defaults are those of xLSTM 7B, and with `block: pre-up` of the first paper."""

    block: Literal["post-up", "pre-up"] = Field(
        "post-up",
        description="the layer of xLSTM 7B; or that of the first paper, which projects up and has a short convolution",
    )
    heads: Auto = Field("auto", description="H, heads; auto: 8, or 4 with pre-up")
    qk_dim_factor: float = Field(
        0.5, gt=0, description="post-up: width of queries and keys as a multiple of the model width"
    )
    v_dim_factor: float = Field(1.0, gt=0, description="post-up: width of values as a multiple of the model width")
    proj_factor: float = Field(
        2.0, gt=0, description="pre-up: inner width as a multiple of the model width, rounded up to a multiple of 64"
    )
    qkv_block: int = Field(4, gt=0, description="pre-up: neighbouring channels that q, k and v mix")
    conv_kernel: int = Field(4, gt=0, description="pre-up: taps of the short convolution")
    gate_soft_cap: Literal["auto"] | Positive | None = Field(
        "auto",
        description="c: gates are c tanh(gate / c) of their projections; null is no cap; auto: 15, or none with pre-up",
    )
    eps: float = Field(1e-6, gt=0, description="added to the normaliser")
    norm_eps: Literal["auto"] | Positive = Field(
        "auto", description="epsilon of the norm of each head's output; auto: 1e-6, or 1e-5 with pre-up"
    )
    bias: bool = Field(False, description="biases on all projections but the gates', which have them anyway")

    @property
    def count(self) -> int:
        """H."""
        if self.heads == "auto":
            return 8 if self.block == "post-up" else 4
        return self.heads

    @property
    def cap(self) -> float | None:
        """The soft cap."""
        if self.gate_soft_cap == "auto":
            return 15.0 if self.block == "post-up" else None
        return self.gate_soft_cap

    @property
    def epsilon(self) -> float:
        """That of the norm."""
        if self.norm_eps == "auto":
            return 1e-6 if self.block == "post-up" else 1e-5
        return self.norm_eps

    def inner(self, dim: int) -> int:
        """Inner width of a pre-up block."""
        return ceil(self.proj_factor * dim / UNIT) * UNIT

    def fit(self, dim: int) -> None:
        if self.block == "post-up":
            for what in ("qk_dim_factor", "v_dim_factor"):
                fit_heads(scaled(dim, getattr(self, what), what), self.count, what=f"{what} * dim =")
            return
        inner = self.inner(dim)
        fit_heads(inner, self.count, what="the inner width")
        if inner % self.qkv_block:
            usable = [n for n in range(1, self.qkv_block) if inner % n == 0]
            raise ValueError(
                f"the inner width {inner} is not divisible by qkv_block {self.qkv_block}; use qkv_block {usable[-1]}"
            )
