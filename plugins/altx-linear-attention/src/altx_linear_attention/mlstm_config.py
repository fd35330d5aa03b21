"""Config of `mlstm`. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from altx.config import Config
from altx_linear_attention.heads import fit_heads, scaled


class MLSTMConfig(Config):
    """Config of `mlstm`. The defaults are those of xLSTM 7B."""

    heads: int = Field(8, gt=0, description="H, heads")
    qk_dim_factor: float = Field(0.5, gt=0, description="width of queries and keys as a multiple of the model width")
    v_dim_factor: float = Field(1.0, gt=0, description="width of values as a multiple of the model width")
    gate_soft_cap: float | None = Field(
        15.0, gt=0, description="c: gates start from c tanh(gate / c) of their projections; null is no cap"
    )
    eps: float = Field(1e-6, gt=0, description="added to the normaliser")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norm of each head's output")
    bias: bool = Field(False, description="biases on all projections but the gates', which have them anyway")

    def fit(self, dim: int) -> None:
        for what in ("qk_dim_factor", "v_dim_factor"):
            fit_heads(scaled(dim, getattr(self, what), what), self.heads, what=f"{what} * dim =")
