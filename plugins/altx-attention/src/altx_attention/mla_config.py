"""Config and capabilities of `mla`. Never imports torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from altx.capabilities import Capabilities
from altx.config import Config


class LatentAttentionConfig(Config):
    """Config of `mla`. Widths left out are the published ones where the model is wide enough."""

    heads: int = Field(4, gt=0, description="heads")
    q_lora_rank: int | None = Field(
        None, gt=0, description="width that queries are compressed to; default: they are not (DeepSeek-V3: 1536)"
    )
    kv_lora_rank: int | None = Field(
        None, gt=0, description="width that keys and values are compressed to; default: dim / 4, at most 512"
    )
    qk_nope_head_dim: int | None = Field(
        None, gt=0, description="width of a head's query and key without position; default: dim / heads, at most 128"
    )
    qk_rope_head_dim: int | None = Field(
        None, gt=0, description="width of what is rotated, one key for all heads; default: half of that, even"
    )
    v_head_dim: int | None = Field(None, gt=0, description="width of a head's value; default: dim / heads, at most 128")
    rotary: bool = Field(True, description="rotate by position; without it, no positions (Kimi Linear)")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary wavelengths")
    rope_interleave: bool = Field(
        True, description="a rotated pair is two neighbours (DeepSeek's weights), else features half the width apart"
    )
    scale: float | None = Field(
        None,
        gt=0,
        description="what products are multiplied by; default: (width of a head's query) ** -0.5",
    )
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square by the norms of what is compressed")
    bias: bool = Field(False, description="biases where DeepSeek's have them: both compressions and the output")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rotary and self.qk_rope_head_dim and self.qk_rope_head_dim % 2:
            raise ValueError(
                f"rotary needs an even qk_rope_head_dim, not {self.qk_rope_head_dim}; use qk_rope_head_dim "
                f"{self.qk_rope_head_dim + 1}, or rotary false"
            )
        return self

    def head(self, dim: int) -> int:
        """Default width of a head at model width `dim`."""
        return max(1, min(128, dim // self.heads))

    def nope(self, dim: int) -> int:
        """Width of a head's query and key without position."""
        return self.qk_nope_head_dim or self.head(dim)

    def rope(self, dim: int) -> int:
        """Width of the rotated part."""
        return self.qk_rope_head_dim or max(2, self.head(dim) // 4 * 2)

    def value(self, dim: int) -> int:
        """Width of a head's value."""
        return self.v_head_dim or self.head(dim)

    def rank(self, dim: int) -> int:
        """Width of what keys and values are compressed to."""
        return self.kv_lora_rank or max(1, min(512, dim // 4))


def capabilities(config: LatentAttentionConfig) -> Capabilities:
    """Everything but packing, which altx unpacks."""
    return Capabilities(bidirectional=True, growth="linear", rollback="crop", shares_kv=True)
