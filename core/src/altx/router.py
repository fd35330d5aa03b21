"""Routers: which targets (experts, mixers, memories, ...) each token uses, and with what weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altx import dispatch
from altx.capabilities import RouterCapabilities
from altx.context import Context
from altx.layer import FRESH, Component
from altx.state import State


@dataclass(frozen=True)
class Targets:
    """What there is to choose among.

    Args:
        n: number of targets.
        kind: experts, mixers, memories, states, depths or blocks.
        keys: (n, D) or (B, n, D) contents to match tokens against, or None.
        alive: (n,) bool; a dead target is never chosen, even when fewer than k live.
        depth: for a router that is `stepwise`, the one target that it may choose now.
    """

    n: int
    kind: str = "experts"
    keys: Tensor | None = None
    alive: Tensor | None = None
    depth: int = 0


@dataclass(frozen=True)
class Slots:
    """A decision without a choice: each target gets S mixtures of every row's tokens. Both carry the gradient.

    Args:
        dispatch: (B, n, S, T) shares of the tokens in a slot.
        combine: (B, n, S, T) what a slot's output is multiplied by for each token.
    """

    dispatch: Tensor
    combine: Tensor


@dataclass(frozen=True)
class Route:
    """A decision. Each of P pairs sends one token to one target; `weight` carries the gradient.

    Token choice has P = B*T*K, target choice P = B*n*C. With `slots` there are no pairs.

    Args:
        n: number of targets.
        token: (P,) int64 b*T + t.
        target: (P,) int64, -1 for none: a masked token, a dead target, a dropped pair.
        weight: (P,) what the target's output is multiplied by.
        losses: unscaled auxiliary losses, over real tokens only.
        metrics: detached; "load" (n,) counts the tokens sent to each target.
        state: the router's advanced state, if it has one.
        slots: of a router whose capabilities say `mixes`.
    """

    n: int
    token: Tensor
    target: Tensor
    weight: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    state: State | None = None
    slots: Slots | None = None

    def plan(self) -> dispatch.Plan:
        """The sorted plan that serves grouped matmul and stateful targets alike."""
        return dispatch.plan(self.token, self.target, self.weight, self.n)

    def dense(self, batch: int, length: int) -> Tensor:
        """Weights as (n, B, T), 0 where a token does not use a target."""
        used = self.target >= 0
        flat = self.weight.new_zeros(self.n, batch * length)
        place = (self.target.clamp(min=0), self.token)
        return flat.index_put(place, self.weight * used, accumulate=True).reshape(self.n, batch, length)

    def chosen(self, batch: int, length: int) -> Tensor:
        """(n, B, T) bool: which targets each token uses."""
        flat = torch.zeros(self.n + 1, batch * length, dtype=torch.bool, device=self.token.device)
        flat[torch.where(self.target < 0, self.n, self.target), self.token] = True
        return flat[: self.n].reshape(self.n, batch, length)


class Router(Component):
    """Decides which targets each token uses."""

    capabilities: RouterCapabilities

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | None:
        """The router's state before the first token, if it has one; arguments as for a layer."""
        return None

    @abstractmethod
    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        """Route the tokens of x (B, T, D). Masked tokens get no target and count in nothing."""
