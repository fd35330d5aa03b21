"""Configs and capabilities. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.capabilities import Capabilities
from altx.config import Config
from altx_rwkv.heads import HeadsConfig


class RWKV4Config(Config):
    """Config of `rwkv4`. There is nothing to set: a channel is a head, and all sizes are the model width."""


class RWKV5Config(HeadsConfig):
    """Config of `rwkv5`. The defaults are those of the authors' models."""


class RWKV6Config(HeadsConfig):
    """Config of `rwkv6`. The defaults are those of the authors' models."""

    mix_rank: int = Field(32, gt=0, description="rank of what a token adds to each token shift")
    decay_rank: int = Field(64, gt=0, description="rank of what a token adds to its decay")


Rank = Literal["auto"] | Annotated[int, Field(gt=0)]


class RWKV7Config(HeadsConfig):
    """Config of `rwkv7`. The defaults are those of the paper and of the authors' models.

    Automatic ranks are multiples of 32, and 32 at least.
    """

    decay_rank: Rank = Field("auto", description="rank of the decay's projection; auto: 1.8 sqrt(dim)")
    iclr_rank: Rank = Field("auto", description="rank of the in-context learning rate's; auto: 1.8 sqrt(dim)")
    value_rank: Rank = Field("auto", description="rank of the value residual's; auto: 1.3 sqrt(dim)")
    gate_rank: Rank = Field("auto", description="rank of the gate's; auto: 0.6 dim^0.8")

    def ranks(self, dim: int) -> dict[str, int]:
        """The four ranks at model width `dim`."""

        def rank(given: Rank, size: float) -> int:
            return max(32, round(size / 32) * 32) if given == "auto" else given

        return {
            "decay_rank": rank(self.decay_rank, 1.8 * dim**0.5),
            "iclr_rank": rank(self.iclr_rank, 1.8 * dim**0.5),
            "value_rank": rank(self.value_rank, 1.3 * dim**0.5),
            "gate_rank": rank(self.gate_rank, 0.6 * dim**0.8),
        }


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


def rwkv7(config: RWKV7Config) -> Capabilities:
    """As the others; the first in a model exports its value, which those after it blend into theirs."""
    return Capabilities(growth="constant", rollback="snapshot", shares=frozenset({"v_first"}))
