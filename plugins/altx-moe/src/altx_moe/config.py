"""Configs and capabilities of the routers."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import RouterCapabilities
from altx.config import RouterConfig


class BalancedConfig(RouterConfig):
    """Config of a router with the auxiliary losses of token choice."""

    balance_weight: float = Field(0.01, ge=0, description="recommended weight of the load-balance loss")
    z_weight: float = Field(0.001, ge=0, description="recommended weight of the z-loss, which keeps logits small")

    @property
    def losses(self) -> dict[str, float]:
        """Recommended weights of the losses that are computed."""
        weights = {"balance": self.balance_weight, "z": self.z_weight}
        return {name: weight for name, weight in weights.items() if weight}


class TopKConfig(BalancedConfig):
    """Config of `topk`."""

    k: int = Field(2, gt=0, description="targets per token, beside the shared ones")
    score: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="from the gate's logits to scores; a softmax after the top-k is softmax with renormalise",
    )
    renormalise: bool = Field(True, description="make the weights of a token's k targets add up to 1")
    scale: float = Field(1.0, gt=0, description="what the weights are multiplied by in the end; 2.5 in DeepSeek-V3")
    shared: int = Field(0, ge=0, description="that many of the targets, the first, serve every token with weight 1")
    groups: int = Field(1, gt=0, description="neighbouring targets form so many groups; 8 in DeepSeek-V3")
    groups_used: int = Field(1, gt=0, description="groups in which a token's targets lie; 4 in DeepSeek-V3")
    noise: bool = Field(False, description="while training, logits get noise of a learned size (Shazeer et al. 2017)")
    bias_rate: float = Field(
        0.0, ge=0, description="step of the bias that balances without a loss; 0.001 in DeepSeek-V3, 0 for none"
    )

    @model_validator(mode="after")
    def _weights_vary(self) -> Self:
        if self.k == 1 and self.renormalise:
            raise ValueError(
                "with k 1 and renormalise every weight is 1, so the task would never train the router; "
                "set renormalise to false, or k to 2 or more"
            )
        if self.groups_used > self.groups:
            raise ValueError(f"groups_used {self.groups_used} is more than the groups; use at most {self.groups}")
        return self

    def fit_targets(self, n: int) -> None:
        if self.shared >= n:
            raise ValueError(f"{self.shared} shared leave none to choose; use at most {n - 1}, or more targets")
        routed = n - self.shared
        if routed % self.groups:
            raise ValueError(
                f"{routed} targets do not form {self.groups} groups of one size; use a divisor of {routed}"
            )
        most = routed // self.groups * self.groups_used
        if self.k > most:
            raise ValueError(f"k {self.k} is more than there are; use k of at most {most}, or more targets")


class SwitchConfig(BalancedConfig):
    """Config of `switch`."""

    capacity_factor: float | None = Field(
        1.25, gt=0, description="tokens that a target takes of a row in training, of its even share; null: all"
    )
    jitter: float = Field(
        0.0, ge=0, lt=1, description="while training, the gate's input is multiplied by 1 - jitter to 1 + jitter"
    )
    z_weight: float = Field(0.0, ge=0, description="recommended weight of the z-loss, which keeps logits small")


class ExpertChoiceConfig(RouterConfig):
    """Config of `expert-choice`."""

    capacity_factor: float = Field(2.0, gt=0, description="targets per token, on average")

    def capacity(self, tokens: int, n: int) -> int:
        """How many of a row's `tokens` each of n targets uses."""
        return min(tokens, math.ceil(self.capacity_factor * tokens / n))


class _SeveralTargets(RouterConfig):
    """A token uses k targets, of which there must be as many."""

    k: int = Field(1, gt=0, description="targets per token")

    def fit_targets(self, n: int) -> None:
        if self.k > n:
            raise ValueError(f"k {self.k} is more than there are; use k of at most {n}, or more targets")


class SinkhornConfig(_SeveralTargets):
    """Config of `sinkhorn`."""

    iterations: int = Field(32, gt=0, description="of the Sinkhorn algorithm, while training")


class BaseConfig(RouterConfig):
    """Config of `base`."""

    precision: float = Field(
        1e-3, gt=0, lt=1, description="a token's score may be that far from the best assignment's, of their spread"
    )
    rounds: int = Field(1000, gt=0, description="of the auction at most; who is left takes what is free")


class HashConfig(_SeveralTargets):
    """Config of `hash`."""

    k: int = Field(1, gt=0, description="targets per token, with weights 1 / k")
    seed: int = Field(0, ge=0, description="which random table; routers of different layers may use different ones")


class SoftConfig(RouterConfig):
    """Config of `soft`."""

    slots: int = Field(1, gt=0, description="slots of each target in each row")
    normalise: bool = Field(True, description="unit length of tokens and slots, with a learned scale")


class DepthsConfig(RouterConfig):
    """Config of `mixture-of-depths`."""

    capacity: float = Field(0.125, gt=0, le=1, description="share of a row's tokens that each target uses")
    score: Literal["linear", "sigmoid"] = Field("linear", description="from the gate's logit to the weight")
    predictor: Literal["gate", "mlp"] = Field(
        "gate", description="what says in a stream which tokens would be chosen; mlp: a network of hidden width dim / 4"
    )
    predictor_weight: float = Field(0.01, gt=0, description="recommended weight of the predictor's loss")


class RecursionsConfig(BalancedConfig):
    """Config of `mixture-of-recursions`."""

    choice: Literal["expert", "token"] = Field(
        "expert", description="each depth picks from the tokens that are left, or a token its depth from the start"
    )
    capacity: list[float] | None = Field(
        None, description="expert: share of a row's tokens at each depth; null: 1, (N - 1) / N, ... for N depths"
    )
    capacity_warmup_steps: int = Field(
        0, ge=0, description="expert: optimizer steps in which shares fall from 1 to the capacity, along a cosine"
    )
    score: Literal["sigmoid", "tanh", "softmax"] | None = Field(
        None,
        description="from logits to weights: sigmoid or tanh (expert), softmax or sigmoid (token); null: the first",
    )
    scale: float | None = Field(
        None, gt=0, description="what scores are multiplied by; null: 1 for softmax, 0.1 for the others"
    )
    predictor: Literal["gate", "mlp"] = Field(
        "gate", description="expert: what says in a stream which tokens would go on; as in mixture-of-depths"
    )
    predictor_weight: float = Field(0.001, gt=0, description="expert: recommended weight of the predictor's loss")
    balance_weight: float = Field(0.1, ge=0, description="token: recommended weight of the load-balance loss")
    z_weight: float = Field(0.0, ge=0, description="recommended weight of the z-loss, which keeps logits small")
    bias_rate: float = Field(
        0.0, ge=0, description="token: step of the bias that balances without a loss, 0.001 in the paper; 0 for none"
    )
    balance_warmup_steps: int = Field(
        0,
        ge=0,
        description="token: optimizer steps in which every token goes to the last depth, before any is balanced",
    )

    @model_validator(mode="after")
    def _of_one_choice(self) -> Self:
        others = {
            "expert": ("balance_weight", "bias_rate", "balance_warmup_steps"),
            "token": ("capacity", "capacity_warmup_steps", "predictor", "predictor_weight"),
        }
        for name in others[self.choice]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing with choice {self.choice}; leave it out")
        fitting = ("sigmoid", "tanh") if self.choice == "expert" else ("softmax", "sigmoid")
        if self.score and self.score not in fitting:
            raise ValueError(f"with choice {self.choice} score is one of {', '.join(fitting)}, not {self.score}")
        if self.capacity is not None:
            if not self.capacity or not all(0 < share <= 1 for share in self.capacity):
                raise ValueError("capacity lists a share for each depth, each above 0 and at most 1")
            if self.capacity != sorted(self.capacity, reverse=True):
                raise ValueError("capacity may not rise: a depth picks from the tokens of the one before")
        return self

    def fit_targets(self, n: int) -> None:
        if self.capacity is not None and len(self.capacity) != n:
            raise ValueError(f"capacity lists {len(self.capacity)} shares; give one for each of the {n} depths")

    def capacities(self, n: int) -> list[float]:
        """Of a row's tokens the share that each of n depths uses."""
        return self.capacity or [(n - depth) / n for depth in range(n)]

    @property
    def factor(self) -> float:
        """What scores are multiplied by; the authors' defaults."""
        softmax = self.choice == "token" and self.score != "sigmoid"
        return self.scale or (1.0 if softmax else 0.1)

    @property
    def by_token(self) -> TopKConfig:
        """Choice token as settings of topk, which it is."""
        return TopKConfig(
            k=1,
            renormalise=False,
            score="sigmoid" if self.score == "sigmoid" else "softmax",
            scale=self.factor,
            bias_rate=self.bias_rate,
            balance_weight=self.balance_weight,
            z_weight=self.z_weight,
        )


def topk_capabilities(config: TopKConfig) -> RouterCapabilities:
    """Token by token: everything is honoured because no token's route depends on another."""
    return RouterCapabilities(bidirectional=True, packing=True, losses=config.losses)


def switch_capabilities(config: SwitchConfig) -> RouterCapabilities:
    """Tokens of a row compete while training only."""
    if config.capacity_factor is None:
        return RouterCapabilities(bidirectional=True, packing=True, losses=config.losses)
    return RouterCapabilities(bidirectional=True, lookahead="sequence", decode="argmax", losses=config.losses)


def expert_choice_capabilities(config: ExpertChoiceConfig) -> RouterCapabilities:
    """Tokens of a row compete, so the whole row must be there."""
    return RouterCapabilities(
        causal=False, bidirectional=True, streaming="none", reset=False, lookahead="sequence", decode="forbid"
    )


def batch_capabilities(config: SinkhornConfig | BaseConfig) -> RouterCapabilities:
    """Tokens of a batch compete while training only."""
    return RouterCapabilities(bidirectional=True, packing=True, lookahead="batch", decode="argmax")


def hash_capabilities(config: HashConfig) -> RouterCapabilities:
    """Nothing is looked at but the token's number."""
    return RouterCapabilities(bidirectional=True, packing=True, requires=frozenset({"token_ids"}))


def soft_capabilities(config: SoftConfig) -> RouterCapabilities:
    """Every slot is a mixture of a whole row."""
    return RouterCapabilities(
        causal=False,
        bidirectional=True,
        streaming="none",
        reset=False,
        lookahead="sequence",
        decode="forbid",
        mixes=True,
    )


def depths_capabilities(config: DepthsConfig) -> RouterCapabilities:
    """Tokens of a row compete while training, and in an encoder; in a causal model a predictor decides afterwards."""
    return RouterCapabilities(
        bidirectional=True, lookahead="sequence", decode="predictor", losses={"predictor": config.predictor_weight}
    )


def recursions_capabilities(config: RecursionsConfig) -> RouterCapabilities:
    """By token choice as topk; else as mixture of depths, at every depth anew."""
    if config.choice == "token":
        return topk_capabilities(config.by_token)
    weights = {"predictor": config.predictor_weight, "z": config.z_weight}
    return RouterCapabilities(
        bidirectional=True,
        lookahead="sequence",
        decode="predictor",
        losses={name: weight for name, weight in weights.items() if weight},
        stepwise=True,
    )
