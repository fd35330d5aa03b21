"""Config and capabilities of `infini`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class InfiniConfig(Config):
    """Config of `infini`. The paper trains with segments of 2048."""

    segment: int = Field(512, gt=0, le=1 << 30, description="tokens after which what they wrote can be read")
    update: Literal["linear", "delta"] = Field(
        "linear", description="what is written for a key: its value, or the value less what the memory gives for it"
    )
    heads: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto",
        description="memories side by side H; auto: model width / 64, or the attention's own where it hands them",
    )
    head_dim: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="width d of queries, keys and values; auto: model width / heads, or the attention's own"
    )
    gate: float = Field(
        0.0, ge=-100, le=100, description="b of each head at the start; sigmoid(b) is the share of the memory"
    )

    def sizes(self, dim: int) -> tuple[int, int]:
        """H and d at model width `dim`."""
        heads = max(1, dim // 64) if self.heads == "auto" else self.heads
        return heads, max(1, dim // heads) if self.head_dim == "auto" else self.head_dim

    def fit(self, dim: int) -> None:
        if self.heads != "auto" and self.head_dim == "auto" and self.heads > dim:
            raise ValueError(f"{self.heads} heads leave none of its {dim} channels to each; use {dim} heads or fewer")


def capabilities(config: InfiniConfig) -> MemoryCapabilities:
    """Streams in any pieces: what the open segment will add is part of the state."""
    return MemoryCapabilities(growth="constant", rollback="snapshot", chunk=config.segment, compiles=False)
