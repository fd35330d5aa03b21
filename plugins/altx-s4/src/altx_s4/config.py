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


class S4Config(StateSpaceConfig):
    """Config of `s4`. The defaults are those of the authors' code."""

    state_size: int = Field(
        64, gt=0, description="real states of a channel, an even number: one in each conjugate pair"
    )
    n_ssm: int | None = Field(
        None, gt=0, description="how many A, B and P the channels share, a divisor of the width; none: each has its own"
    )
    lr: float | None = Field(
        0.001, gt=0, description="learning rate of A, B, P and the step size, which do not decay; none: the model's"
    )

    @field_validator("state_size")
    @classmethod
    def _even(cls, value: int) -> int:
        return even(value)

    def fit(self, dim: int) -> None:
        if self.n_ssm and dim % self.n_ssm:
            known = [n for n in range(1, dim + 1) if dim % n == 0]
            raise ValueError(f"n_ssm {self.n_ssm} does not divide the model width {dim}; use one of {known} or none")


class S4DConfig(StateSpaceConfig):
    """Config of `s4d`. The defaults are those of the authors' code."""

    state_size: int = Field(
        64, gt=0, description="real states of a channel, an even number: one in each conjugate pair"
    )
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


class S5Config(StateSpaceConfig):
    """Config of `s5`. The defaults are those of the authors' code."""

    state_size: int = Field(256, gt=0, description="real states of the layer, an even number for every block")
    blocks: int = Field(8, gt=0, description="A starts as so many HiPPO matrices along a diagonal")
    C_init: Literal["trunc_standard_normal", "lecun_normal", "complex_normal"] = Field(
        "trunc_standard_normal", description="how C starts; the first two are real and turned into the eigenbasis"
    )
    discretization: Literal["zoh", "bilinear"] = Field("zoh", description="zero-order hold, or the bilinear transform")
    clip_eigs: bool = Field(
        False, description="keep the real parts of the eigenvalues below -0.0001, so that all decays"
    )
    activation: Literal["full_glu", "half_glu1", "half_glu2", "gelu"] = Field(
        "half_glu1",
        description="the output: gelu(y) through a GLU with two matrices, gelu(y) gated by one, y gated by one of "
        "gelu(y), or gelu(y)",
    )
    lr: float | None = Field(
        0.001, gt=0, description="learning rate of A, B and the step size, which do not decay; none: the model's"
    )

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if self.state_size % (2 * self.blocks):
            some = 2 * self.blocks * max(round(self.state_size / (2 * self.blocks)), 1)
            raise ValueError(
                f"state_size {self.state_size} is no multiple of twice the blocks, 2 x {self.blocks}; use {some}, or "
                "other blocks"
            )
        return self


def even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} states do not make conjugate pairs; use {value + 1}")
    return value


def capabilities(config: StateSpaceConfig) -> Capabilities:
    """A recurrence of constant state; from both ends, none."""
    if config.bidirectional:
        return Capabilities(causal=False, bidirectional=True, streaming="none", growth="none", reset=False)
    return Capabilities(growth="constant", rollback="snapshot")
