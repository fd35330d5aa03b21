"""Config and capabilities of `token-turing`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class TokenTuringConfig(Config):
    """Config of `token-turing`. The sizes of memory and process are the paper's."""

    frame: int = Field(64, gt=0, le=1 << 20, description="tokens of a step, which are read and written together")
    memory: int = Field(96, gt=0, le=1 << 16, description="memory tokens m")
    process: int = Field(
        16, gt=0, le=1 << 16, description="tokens r that memory and frame are summarised to, and output"
    )
    layers: int = Field(1, gt=0, description="of the transformer that processes them")
    heads: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="of its attention; auto: model width / 64"
    )
    expansion: float = Field(4.0, gt=0, description="hidden width of its feed-forwards as a multiple of model width")
    bottleneck: int = Field(64, gt=0, description="hidden width of what chooses tokens")

    def count(self, dim: int) -> int:
        """Heads at model width `dim`."""
        if self.heads != "auto":
            return self.heads
        return next(n for n in range(max(1, dim // 64), 0, -1) if dim % n == 0)

    def fit(self, dim: int) -> None:
        if dim % self.count(dim):
            fitting = [n for n in range(1, dim + 1) if dim % n == 0]
            raise ValueError(f"{self.heads} heads do not divide dim {dim}; use {', '.join(map(str, fitting))} heads")
        if int(dim * self.expansion) < 1:
            raise ValueError(f"expansion {self.expansion} of dim {dim} leaves no hidden unit; use {1 / dim} or more")


def capabilities(config: TokenTuringConfig) -> MemoryCapabilities:
    """Streams in any pieces: the open frame is part of the state. In an encoder a frame is read whole."""
    return MemoryCapabilities(
        bidirectional=True, growth="constant", rollback="snapshot", chunk=config.frame, compiles=False
    )
