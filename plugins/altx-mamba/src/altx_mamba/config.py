"""Config and capabilities of `mamba`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import Capabilities
from altx.config import Config


class MambaConfig(Config):
    """Config of `mamba`. The defaults are those of the paper and of its authors' code."""

    state_size: int = Field(16, gt=0, description="N, numbers of state per channel")
    conv_kernel: int = Field(4, gt=0, description="K, taps of the short convolution")
    expand: int = Field(2, gt=0, description="inner width as a multiple of the model width")
    dt_rank: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="rank of the step size's projection; auto: model width / 16, rounded up"
    )
    dt_min: float = Field(0.001, gt=0, description="smallest step size at the start")
    dt_max: float = Field(0.1, gt=0, description="largest step size at the start")
    dt_init_floor: float = Field(1e-4, gt=0, description="no step size starts below this")
    conv_bias: bool = Field(True, description="bias on the convolution")
    bias: bool = Field(False, description="biases on the projections in and out")
    inner_norm_eps: float | None = Field(
        None, gt=0, description="RMSNorm without weights on dt, B and C, with this epsilon (FalconMamba: 1e-6)"
    )
    rescale_out_proj: bool = Field(
        True, description="divide the output projection's first weights by the square root of the number of blocks"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}; use dt_min <= dt_max")
        return self

    def rank(self, dim: int) -> int:
        """Rank of the step size's projection at model width `dim`."""
        return -(-dim // 16) if self.dt_rank == "auto" else self.dt_rank


def capabilities(config: MambaConfig) -> Capabilities:
    """A recurrence of constant state: streams by token, and is rolled back by keeping an earlier state."""
    return Capabilities(growth="constant", rollback="snapshot")
