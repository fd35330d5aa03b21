"""Config of `linear-attention`, and the capabilities of all recurrent mixers here. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.capabilities import Capabilities
from altx.config import Config
from altx_linear_attention.heads import fit_heads

Auto = Literal["auto"] | Annotated[int, Field(gt=0)]
"""A size, or that of the authors where it fits."""


class LinearAttentionConfig(Config):
    """Config of `linear-attention`. The defaults are those of the paper's image model and its authors' code."""

    heads: int = Field(8, gt=0, description="H, heads; each is model width / H wide")
    feature_map: Literal["elu", "relu", "exp"] = Field(
        "elu",
        description="phi: elu(x) + 1; relu(x); or exp(k) for keys with softmax over a head's channels for queries",
    )
    bias: bool = Field(True, description="biases on the projections of queries, keys and values")
    out_bias: bool = Field(True, description="a bias on the projection out")
    eps: float = Field(1e-6, gt=0, description="added to the normaliser")

    def fit(self, dim: int) -> None:
        fit_heads(dim, self.heads)


def linear_attention(config: LinearAttentionConfig) -> Capabilities:
    """Both ways, and a recurrence of constant state when causal."""
    return Capabilities(bidirectional=True, growth="constant", rollback="snapshot")


def recurrent(config: Config) -> Capabilities:
    """A recurrence of constant state: streams by token, and is rolled back by keeping an earlier state."""
    return Capabilities(growth="constant", rollback="snapshot")
