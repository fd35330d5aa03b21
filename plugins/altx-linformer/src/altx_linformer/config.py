"""Config and capabilities of `linformer`. Never imports torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import Capabilities
from altx.config import Config


class LinformerConfig(Config):
    """Config of `linformer`. The defaults are those of the package linformer, which has none for `max_len`."""

    max_len: int = Field(1024, gt=0, description="n, longest sequence; E and F have a row for each of its places")
    k: int = Field(256, gt=0, description="k, mixtures of the tokens that are attended to")
    heads: int = Field(8, gt=0, description="H, heads")
    head_dim: int | None = Field(None, gt=0, description="d, width of a head; default: model width / heads")
    sharing: Literal["none", "headwise", "key-value"] = Field(
        "headwise",
        description="none: each head has E and F of its own; headwise: all heads have the same; key-value: and E = F",
    )
    one_kv_head: bool = Field(False, description="one head of keys and values, which all heads of queries share")
    share_kv: bool = Field(False, description="values are the keys: one projection for both, and E = F")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sharing == "none" and (self.one_kv_head or self.share_kv):
            other = "one_kv_head" if self.one_kv_head else "share_kv"
            raise ValueError(f"sharing none gives each head E and F of its own, and {other} is set; use headwise")
        return self

    def width(self, dim: int) -> int:
        """Width of a head at model width `dim`."""
        return self.head_dim or dim // self.heads

    def fit(self, dim: int) -> None:
        if self.head_dim is None and dim % self.heads:
            divisors = [n for n in range(1, dim + 1) if dim % n == 0]
            nearest = [n for n in divisors if n < self.heads][-1:] + [n for n in divisors if n > self.heads][:1]
            raise ValueError(
                f"dim {dim} is not divisible by heads {self.heads}; use heads {' or '.join(map(str, nearest))}, "
                f"or dim {-(-dim // self.heads) * self.heads}, or set head_dim"
            )


def capabilities(config: LinformerConfig) -> Capabilities:
    """It looks both ways over the whole sequence: for encoders, without a state; altx unpacks packed batches."""
    return Capabilities(causal=False, bidirectional=True, streaming="none", max_len=config.max_len)
