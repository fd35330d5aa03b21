"""Configs and capabilities of the built-in feed-forward layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from altx.capabilities import Capabilities
from altx.config import Config


class FeedForwardConfig(Config):
    """Shared by both.

    The hidden width is `hidden` if given, else `expand` times the model width, rounded up to a multiple of 8.
    """

    hidden: int | None = Field(None, gt=0, description="hidden width F; overrides expand")
    expand: float = Field(4.0, gt=0, description="hidden width as a multiple of the model width")

    def width(self, dim: int) -> int:
        """Hidden width F at model width D."""
        return self.hidden or -(-int(self.expand * dim) // 8) * 8


class SwiGLUConfig(FeedForwardConfig):
    """Config of `swiglu`."""

    # Three matrices instead of two: 8/3 keeps the parameters of an MLP with expand 4.
    expand: float = Field(8 / 3, gt=0, description="hidden width as a multiple of the model width")


class MLPConfig(FeedForwardConfig):
    """Config of `mlp`."""

    activation: Literal["gelu", "relu", "silu", "relu2"] = Field("gelu", description="f")
    bias: bool = Field(True, description="whether the linear maps have biases")


TOKENWISE = Capabilities(bidirectional=True, packing=True)
"""Everything is honoured, because no token sees another."""


def capabilities(config: FeedForwardConfig) -> Capabilities:
    return TOKENWISE
