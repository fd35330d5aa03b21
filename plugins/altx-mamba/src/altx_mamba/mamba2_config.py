"""Config and capabilities of `mamba2`. Never imports torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from altx.capabilities import Capabilities
from altx.config import Config
from altx_mamba.heads import fit_heads


class Mamba2Config(Config):
    """Config of `mamba2`. The defaults are those of the authors' code."""

    state_size: int = Field(128, gt=0, description="N, rows of a head's state")
    head_dim: int = Field(64, gt=0, description="P, width of a head; there are expand * model width / P heads")
    expand: int = Field(2, gt=0, description="inner width as a multiple of the model width")
    n_groups: int = Field(1, gt=0, description="G, groups of heads that share B and C, and groups of the gated norm")
    conv_kernel: int = Field(4, gt=0, description="K, taps of the short convolution")
    A_min: float = Field(1.0, gt=0, description="smallest rate of decay -A at the start")
    A_max: float = Field(16.0, gt=0, description="largest rate of decay -A at the start")
    dt_min: float = Field(0.001, gt=0, description="smallest step size at the start")
    dt_max: float = Field(0.1, gt=0, description="largest step size at the start")
    dt_init_floor: float = Field(1e-4, gt=0, description="no step size starts below this")
    dt_lower: float = Field(0.0, ge=0, description="no step size is ever below this (dt_limit[0] of the authors' code)")
    dt_upper: float | None = Field(
        None, gt=0, description="no step size is ever above this (dt_limit[1] of the authors' code); default: no limit"
    )
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the gated norm")
    conv_bias: bool = Field(True, description="bias on the convolution")
    bias: bool = Field(False, description="biases on the projections in and out")
    rescale_out_proj: bool = Field(
        True, description="divide the output projection's first weights by the square root of the number of blocks"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (("dt_min", "dt_max"), ("A_min", "A_max"), ("dt_lower", "dt_upper")):
            least, most = getattr(self, low), getattr(self, high)
            if most is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}; use {low} <= {high}")
        return self

    def fit(self, dim: int) -> None:
        fit_heads(dim, self.expand, self.head_dim, self.n_groups)


def capabilities(config: Mamba2Config) -> Capabilities:
    """A recurrence of constant state: streams by token, and is rolled back by keeping an earlier state."""
    return Capabilities(growth="constant", rollback="snapshot")
