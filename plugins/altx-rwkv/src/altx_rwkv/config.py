"""Configs and capabilities. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from altx.capabilities import Capabilities
from altx.config import Config


class RWKV4Config(Config):
    """Config of `rwkv4`. There is nothing to set: a channel is a head, and all sizes are the model width."""


class ChannelConfig(Config):
    """Config of `rwkv4-channel` and `rwkv7-channel`."""

    hidden: int | None = Field(None, gt=0, description="hidden width F; default: 4 times the model width")

    def width(self, dim: int) -> int:
        """Hidden width F at model width D."""
        return self.hidden or 4 * dim


class RWKV5ChannelConfig(Config):
    """Config of `rwkv5-channel` and `rwkv6-channel`."""

    hidden: int | None = Field(
        None, gt=0, description="hidden width F; default: 3.5 times the model width, down to a multiple of 32"
    )

    def width(self, dim: int) -> int:
        """Hidden width F at model width D."""
        return self.hidden or max(7 * dim // 2 // 32, 1) * 32


def recurrent(config: Config) -> Capabilities:
    """A recurrence of constant state: streams by token, and is rolled back by keeping an earlier state."""
    return Capabilities(growth="constant", rollback="snapshot")
