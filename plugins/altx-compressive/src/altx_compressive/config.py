"""Config and capabilities of `compressive`. Never imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class CompressiveConfig(Config):
    """Config of `compressive`."""

    segment: int = Field(512, gt=0, le=1 << 24, description="tokens that leave together and are compressed together")
    memory: int = Field(
        512, ge=0, le=1 << 24, description="tokens before the open segment that are kept as they are, a queue"
    )
    compressed: int = Field(512, gt=0, le=1 << 24, description="slots of what left it; the oldest give way")
    ratio: int = Field(4, gt=0, description="tokens that become one slot")
    compression: Literal["conv", "mean", "max"] = Field(
        "conv", description="how: a convolution over their keys and one over their values, their mean, their maximum"
    )
    shown: Literal["compressed", "all"] = Field(
        "compressed",
        description="what attention sees: the slots, or the queue, too, for one that sees the open segment alone",
    )
    reconstruction_weight: float = Field(
        1.0, ge=0, description="weight of the loss that the convolution is trained by; 0 for none"
    )

    def fit(self, dim: int) -> None:
        if self.segment % self.ratio:
            fitting = [n for n in range(1, self.segment + 1) if self.segment % n == 0]
            best = sorted(sorted(fitting, key=lambda n: abs(n - self.ratio))[:3])
            raise ValueError(
                f"ratio {self.ratio} does not divide a segment of {self.segment} tokens; "
                f"use a ratio of {', '.join(map(str, best))}"
            )
        if self.memory % self.segment:
            near = self.memory // self.segment * self.segment
            raise ValueError(
                f"memory {self.memory} is no multiple of segment {self.segment}, by which it moves on; "
                f"use {near} or {near + self.segment}"
            )
        if self.compressed < self.segment // self.ratio:
            raise ValueError(
                f"{self.compressed} compressed slots do not hold the {self.segment // self.ratio} of one segment; "
                f"use {self.segment // self.ratio} or more"
            )

    @property
    def learns(self) -> bool:
        """Whether there is a loss."""
        return self.compression == "conv" and self.reconstruction_weight > 0


def capabilities(config: CompressiveConfig) -> MemoryCapabilities:
    """Streams in any pieces: the tokens of the open segment are part of the state."""
    losses = {"reconstruction": config.reconstruction_weight} if config.learns else {}
    return MemoryCapabilities(
        growth="constant", rollback="snapshot", chunk=config.segment, losses=losses, compiles=False
    )
