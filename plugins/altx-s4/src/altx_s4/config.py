"""Configs and capabilities of `s4`, `s4d` and `s5`. Never imports torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from altx.capabilities import Capabilities
from altx.config import Config


class StateSpaceConfig(Config):
    """What the three have in common."""

    dt_min: float = Field(0.001, gt=0, description="smallest step size at the start")
    dt_max: float = Field(0.1, gt=0, description="largest step size at the start")
    bidirectional: bool = Field(
        False, description="whether each token sees all others; such a layer is neither causal nor streaming"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}; use dt_min <= dt_max")
        return self


class S4DConfig(StateSpaceConfig):
    """Config of `s4d`. The defaults are those of the authors' code."""

    state_size: int = Field(64, gt=0, description="real states of a channel, an even number: one in each conjugate pair")
    init: Literal["lin", "inv", "real", "legs"] = Field(
        "lin", description="how A starts: S4D-Lin, S4D-Inv, S4D-Real or S4D-LegS of the paper"
    )
    discretization: Literal["zoh", "bilinear"] = Field("zoh", description="zero-order hold, or the bilinear transform")
    lr: float | None = Field(
        0.001, gt=0, description="learning rate of A and the step size, which do not decay; none: that of the model"
    )

    @field_validator("state_size")
    @classmethod
    def _even(cls, value: int) -> int:
        return even(value)


def even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} states do not make conjugate pairs; use {value + 1}")
    return value


def capabilities(config: StateSpaceConfig) -> Capabilities:
    """A recurrence of constant state; from both ends, none."""
    if config.bidirectional:
        return Capabilities(causal=False, bidirectional=True, streaming="none", growth="none", reset=False)
    return Capabilities(growth="constant", rollback="snapshot")
