"""Config and capabilities of `nsm`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from altx.capabilities import MemoryCapabilities, RouterCapabilities
from altx.config import Config, RouterConfig


class NSMConfig(Config):
    """Config of `nsm`.

    The defaults learn to recall 8 pairs (README). 64 states, because tokens of a chunk choose by the keys from before
    it, and what two of them tell one state is mixed; no wider than 128, because a chunk costs about 10 S W^2.
    """

    slots: int = Field(64, ge=2, description="states S, living and dead")
    k: int = Field(2, ge=2, description="states that a token chooses; so many live at the least")
    chunk: int = Field(16, gt=0, description="tokens C that are read before any of them is written")
    width: int | None = Field(None, gt=0, description="numbers per state W; null for the model's width, at most 128")
    heads: int = Field(4, gt=0, description="heads of the attention among states")
    living: int | None = Field(None, description="states that live at first; null for all")
    prune: float = Field(0.1, ge=0, lt=1, description="a state dies when it gets less than this / S of the tokens")
    split: float = Field(
        0.25, gt=0, description="a state that gets more than this part of the tokens is split; 1: none"
    )
    decay: float = Field(0.99, ge=0, lt=1, description="of the running mean of what a state gets, per optimizer step")
    balance_weight: float = Field(0.01, ge=0, description="recommended weight of the load-balance loss; 0 for none")

    @model_validator(mode="after")
    def _states_suffice(self) -> Self:
        if self.k > self.slots:
            raise ValueError(f"k {self.k} is more than the {self.slots} slots; use a k of at most {self.slots}")
        if self.living is not None and not self.k <= self.living <= self.slots:
            raise ValueError(
                f"living {self.living} must lie between k and the number of slots: from {self.k} to {self.slots}"
            )
        if self.width is not None:
            self._heads_fit(self.width)
        return self

    def state_width(self, dim: int) -> int:
        """W in a model of width `dim`."""
        return self.width or min(dim, 128)

    def fit(self, dim: int) -> None:
        self._heads_fit(self.state_width(dim))

    def _heads_fit(self, width: int) -> None:
        if width % self.heads:
            fitting = [heads for heads in range(1, min(width, 64) + 1) if width % heads == 0]
            raise ValueError(f"{self.heads} heads do not divide states of width {width}; use one of {fitting}")


class TokenToStateConfig(RouterConfig):
    """Config of `token-to-state`."""

    k: int = Field(2, ge=2, description="targets that a token chooses; with one, its weight would be 1 in any case")
    chunk: int | None = Field(
        16, gt=0, description="tokens that are routed before what they say changes the states; null: states are fixed"
    )
    width: int | None = Field(None, gt=0, description="numbers per state W; null for the model's width, at most 64")
    balance_weight: float = Field(0.01, ge=0, description="recommended weight of the load-balance loss; 0 for none")

    def state_width(self, dim: int) -> int:
        """W in a model of width `dim`."""
        return self.width or min(dim, 64)

    def fit_targets(self, n: int) -> None:
        if self.k > n:
            raise ValueError(f"k {self.k} is more than there are; use k of at most {n}, or more targets")


def capabilities(config: NSMConfig) -> MemoryCapabilities:
    """Streams token by token with a state of constant size; a chunk that a call leaves open is part of it."""
    losses = {"balance": config.balance_weight} if config.balance_weight else {}
    return MemoryCapabilities(growth="constant", rollback="snapshot", chunk=config.chunk, losses=losses)


def token_to_state_capabilities(config: TokenToStateConfig) -> RouterCapabilities:
    """By the states that the past has left, in a stream as ever; by the token alone where they are fixed."""
    losses = {"balance": config.balance_weight} if config.balance_weight else {}
    if not config.chunk:
        return RouterCapabilities(bidirectional=True, packing=True, losses=losses)
    return RouterCapabilities(
        lookahead="past", chunk=config.chunk, growth="constant", rollback="snapshot", losses=losses
    )
