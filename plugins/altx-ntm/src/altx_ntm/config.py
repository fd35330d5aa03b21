"""Configs and capabilities of `ntm` and `dnc`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class NTMConfig(Config):
    """Config of `ntm`."""

    slots: int = Field(64, gt=0, description="memory rows N")
    width: int = Field(16, gt=0, description="numbers per row W")
    read_heads: int = Field(1, gt=0, description="heads that read")
    write_heads: int = Field(1, gt=0, description="heads that erase and add")
    shift: int = Field(1, gt=0, description="range r of the location shift: 2r+1 shifts, from -r to r")
    memory_init: float = Field(1e-6, gt=0, description="every number of the memory before the first token")
    clip: float = Field(20.0, gt=0, description="head outputs are clipped to +-clip before their activations")
    order: Literal["read-write", "write-read"] = Field(
        "read-write", description="whether a token is read before it is written (Collier & Beel) or after"
    )

    @model_validator(mode="after")
    def _shift_fits(self) -> Self:
        if 2 * self.shift + 1 > self.slots:
            raise ValueError(
                f"shift {self.shift} means {2 * self.shift + 1} shifts, more than the {self.slots} slots; "
                f"use a shift of at most {(self.slots - 1) // 2}, or more slots"
            )
        return self


def capabilities(config: NTMConfig) -> MemoryCapabilities:
    """Streams token by token with a state of constant size."""
    return MemoryCapabilities(growth="constant", rollback="snapshot", order=config.order)


class DNCConfig(Config):
    """Config of `dnc`."""

    slots: int = Field(32, gt=0, description="memory rows N")
    width: int = Field(16, gt=0, description="numbers per row W")
    read_heads: int = Field(2, gt=0, description="heads that read; one head writes")
    clip: float = Field(20.0, gt=0, description="head outputs are clipped to +-clip before their activations")


def dnc_capabilities(config: DNCConfig) -> MemoryCapabilities:
    """Streams token by token with a state of constant size. A token is written before it is read."""
    return MemoryCapabilities(growth="constant", rollback="snapshot", order="write-read")
