"""Configs and capabilities of `topk` and `expert-choice`."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import RouterCapabilities
from altx.config import RouterConfig


class TopKConfig(RouterConfig):
    """Config of `topk`."""

    k: int = Field(2, gt=0, description="targets per token")
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="from the gate's logits to scores")
    renormalise: bool = Field(True, description="make the weights of a token's k targets add up to 1")
    bias_rate: float = Field(
        0.0, ge=0, description="step of the bias that balances without a loss; 0.001 in DeepSeek-V3, 0 for none"
    )
    balance_weight: float = Field(0.01, ge=0, description="recommended weight of the load-balance loss")
    z_weight: float = Field(0.001, ge=0, description="recommended weight of the z-loss, which keeps logits small")

    @model_validator(mode="after")
    def _weights_vary(self) -> Self:
        if self.k == 1 and self.renormalise:
            raise ValueError(
                "with k 1 and renormalise every weight is 1, so the task would never train the router; "
                "set renormalise to false, or k to 2 or more"
            )
        return self

    def fit_targets(self, n: int) -> None:
        if self.k > n:
            raise ValueError(f"k {self.k} is more than there are; use k of at most {n}, or more targets")


class ExpertChoiceConfig(RouterConfig):
    """Config of `expert-choice`."""

    capacity_factor: float = Field(2.0, gt=0, description="targets per token, on average")

    def capacity(self, tokens: int, n: int) -> int:
        """How many of a row's `tokens` each of n targets uses."""
        return min(tokens, math.ceil(self.capacity_factor * tokens / n))


def topk_capabilities(config: TopKConfig) -> RouterCapabilities:
    """Token by token: everything is honoured because no token's route depends on another."""
    losses = {"balance": config.balance_weight, "z": config.z_weight}
    return RouterCapabilities(
        bidirectional=True,
        packing=True,
        lookahead="token",
        decode="same",
        losses={name: weight for name, weight in losses.items() if weight},
    )


def expert_choice_capabilities(config: ExpertChoiceConfig) -> RouterCapabilities:
    """Tokens of a row compete, so the whole row must be there."""
    return RouterCapabilities(
        causal=False, bidirectional=True, streaming="none", reset=False, lookahead="sequence", decode="forbid"
    )
