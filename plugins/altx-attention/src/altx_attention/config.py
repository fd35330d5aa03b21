"""Config and capabilities of `attention`. Never imports torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import Capabilities
from altx.config import Config


class AttentionConfig(Config):
    """Config of `attention`."""

    heads: int = Field(4, gt=0, description="query heads")
    kv_heads: int | None = Field(
        None, gt=0, description="key and value heads, each shared by heads / kv_heads query heads; default: heads"
    )
    head_dim: int | None = Field(None, gt=0, description="width of a head; default: model width / heads")
    rotary: bool = Field(True, description="rotate queries and keys by their position; without it, no positions")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary wavelengths")
    rotary_fraction: float = Field(1.0, gt=0, le=1, description="part of each head's features that is rotated")
    window: int | None = Field(
        None, gt=0, description="a token sees itself and the window - 1 real tokens before it; default: all before it"
    )
    scale: float | None = Field(
        None, gt=0, description="what products of queries and keys are multiplied by; default: head_dim ** -0.5"
    )
    softcap: float | None = Field(
        None, gt=0, description="scores are bent to stay below it, softcap * tanh(score / softcap) (Gemma 2)"
    )
    sinks: bool = Field(False, description="each head learns a score that takes part in its softmax (gpt-oss)")
    qk_norm: Literal["none", "head", "width"] = Field(
        "none", description="RMS norm of queries and keys: of each head (Qwen3, Gemma 3), or of all at once (OLMo 2)"
    )
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square by qk_norm")
    gate: bool = Field(False, description="a sigmoid gate on what the heads return (Qwen3-Next); doubles q_proj")
    bias: bool = Field(
        False, description="biases on the projections (on that of the keys only where softmax does not cancel it)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kv_heads and self.heads % self.kv_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"kv_heads {self.kv_heads} does not divide heads {self.heads}; use kv_heads {_or(divisors)}"
            )
        if self.head_dim:
            if self.rotary and self.head_dim % 2:
                raise ValueError(
                    f"rotary needs an even head_dim, not {self.head_dim}; use head_dim {self.head_dim + 1}, "
                    "or rotary false"
                )
            self._check_fraction(self.head_dim)
        if not self.rotary and self.rotary_fraction != 1:
            raise ValueError(
                "rotary_fraction is of no use without rotary; leave it out for no positions at all, or use rotary true"
            )
        return self

    def _check_fraction(self, head_dim: int) -> None:
        turned = self.rotary_fraction * head_dim
        if self.rotary and (abs(turned - round(turned)) > 1e-3 or round(turned) % 2):
            lower = max(2, int(turned // 2) * 2)
            usable = sorted({n / head_dim for n in (lower, lower + 2) if n <= head_dim})
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction:g} of head_dim {head_dim} is {turned:g} features, which turn "
                f"in pairs; use rotary_fraction {' or '.join(f'{n:g}' for n in usable)}"
            )

    def width(self, dim: int) -> int:
        """Width of a head at model width `dim`."""
        return self.head_dim or dim // self.heads

    def rotated(self, dim: int) -> int:
        """How many features of a head are rotated at model width `dim`."""
        return round(self.rotary_fraction * self.width(dim)) if self.rotary else 0

    def fit(self, dim: int) -> None:
        if self.head_dim:
            return
        even = 2 if self.rotary else 1
        if dim % self.heads:
            problem = f"dim {dim} is not divisible by heads {self.heads}"
        elif dim // self.heads % even:
            problem = f"rotary needs an even head_dim, and dim {dim} / heads {self.heads} is {dim // self.heads}"
        else:
            self._check_fraction(dim // self.heads)
            return
        usable = [n for n in range(1, dim + 1) if dim % (n * even) == 0 and n % (self.kv_heads or 1) == 0]
        nearest = [n for n in usable if n < self.heads][-1:] + [n for n in usable if n > self.heads][:1]
        heads = f"heads {_or(nearest)}, or " if nearest else ""
        unit = self.heads * even
        raise ValueError(f"{problem}; use {heads}dim {-(-dim // unit) * unit}, or set head_dim")


def capabilities(config: AttentionConfig) -> Capabilities:
    """Everything but packing, which altx unpacks; with a window, the last tokens cannot be dropped from the state.

    What a memory or a second sequence adds to the softmax knows of no soft cap.
    """
    return Capabilities(
        bidirectional=True,
        growth="window" if config.window else "linear",
        rollback="snapshot" if config.window else "crop",
        accepts_kv=config.softcap is None,
        cross=config.softcap is None,
        shares_kv=True,
    )


def _or(numbers: list[int]) -> str:
    """1, 2 or 4"""
    return " or ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))
