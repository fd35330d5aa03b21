"""Config and capabilities of `mamba3`. Never imports torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import Capabilities
from altx.config import Config
from altx_mamba.heads import fit_heads


class Mamba3Config(Config):
    """Config of `mamba3`: one input and one output per head (SISO). The paper's form with several (MIMO) is not here.

    The defaults are those of the paper and of its authors' code.
    """

    state_size: int = Field(128, gt=1, description="N, rows of a head's state")
    head_dim: int = Field(64, gt=0, description="P, width of a head; there are expand * model width / P heads")
    expand: int = Field(2, gt=0, description="inner width as a multiple of the model width")
    n_groups: int = Field(1, gt=0, description="G, groups of heads that share B and C but for their biases")
    rope: Literal["half", "full"] = Field("half", description="how much of a state rotates: half its rows, or all")
    decay: Literal["softplus", "heavy-tail"] = Field(
        "softplus",
        description="how -A is computed from a token; heavy-tail (1 + a for a > 0, else 1 / (1 - a)): the authors' "
        "later code, steadier at high learning rates",
    )
    A_floor: float = Field(1e-4, gt=0, description="no rate of decay -A is ever below this")
    dt_min: float = Field(0.001, gt=0, description="smallest step size at the start")
    dt_max: float = Field(0.1, gt=0, description="largest step size at the start")
    dt_init_floor: float = Field(1e-4, gt=0, description="no step size starts below this")
    out_norm: bool = Field(False, description="RMSNorm of each head's output before the gate")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the norms on B, C and the output")
    rescale_out_proj: bool = Field(
        True, description="divide the output projection's first weights by the square root of the number of blocks"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}; use dt_min <= dt_max")
        if not self.angles:
            raise ValueError(f"state_size {self.state_size} has no two rows to rotate in half of it; use state_size 4")
        return self

    @property
    def angles(self) -> int:
        """R, pairs of rows that rotate."""
        return self.state_size // (4 if self.rope == "half" else 2)

    def fit(self, dim: int) -> None:
        fit_heads(dim, self.expand, self.head_dim, self.n_groups)


def capabilities(config: Mamba3Config) -> Capabilities:
    """A recurrence of constant state: streams by token, and is rolled back by keeping an earlier state."""
    return Capabilities(growth="constant", rollback="snapshot")
