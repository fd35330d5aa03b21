"""`Routed(router, targets)`: a layer in which a router chooses, per token, among other layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from altx.capabilities import routed
from altx.context import Context
from altx.layer import FRESH, Component, Layer, Output, scoped
from altx.router import Route, Router, Targets
from altx.state import State


class TargetBank(Component):
    """n stateless, token-wise targets with stacked weights, applied in one grouped call.

    Args:
        n: number of targets.
    """

    n: int

    @abstractmethod
    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Apply target i to rows offsets[i]:offsets[i+1] of x (P, D). Rows from offsets[n] on may hold anything."""


class Routed(Layer):
    """y_t = sum over the targets i that the router chose for token t of weight_ti * target_i(x)_t.

    A target that is not chosen for a token does not see it: its state holds.

    Args:
        router: the router.
        targets: a TargetBank, or layers; layers run on the whole row under a mask, so they must honour one.
        kind: what the targets are, for the router to know.
    """

    def __init__(self, router: Router, targets: TargetBank | Iterable[Layer], kind: str = "experts") -> None:
        super().__init__()
        self.router = router
        self.targets: TargetBank | nn.ModuleList
        self.targets = targets if isinstance(targets, TargetBank) else nn.ModuleList(targets)
        self.kind = kind
        bank = isinstance(self.targets, TargetBank)
        self.n = targets.n if isinstance(targets, TargetBank) else len(self.layers)
        self.capabilities = routed(
            router.capabilities, [self.targets.capabilities] if bank else [t.capabilities for t in self.layers]
        )

    @property
    def layers(self) -> list[Layer]:
        """The targets where they are layers; empty for a bank."""
        return [] if isinstance(self.targets, TargetBank) else list(self.targets)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | None:
        router = self.router.init_state(batch, device=device, dtype=dtype)
        states = [t.init_state(batch, capacity=capacity, device=device, dtype=dtype) for t in self.layers]
        return _tree(router, states)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        batch, length, _ = x.shape
        route = self.router.route(x, Targets(self.n, self.kind), ctx, state.child("router") if state else None)
        losses, metrics = scoped("router", route.losses), scoped("router", route.metrics)
        if isinstance(self.targets, TargetBank):
            plan = route.plan()
            y = plan.combine(self.targets(plan.gather(x), plan.offsets), batch, length)
            return Output(y, _tree(route.state, []) if state else None, losses, metrics)
        y, states = self._run_layers(x, ctx, state, route, losses, metrics)
        return Output(y, _tree(route.state, states) if state else None, losses, metrics)

    def _run_layers(
        self,
        x: Tensor,
        ctx: Context,
        state: State | None,
        route: Route,
        losses: dict[str, Tensor],
        metrics: dict[str, Tensor],
    ) -> tuple[Tensor, list[State | None]]:
        """Each target on the whole batch, with the tokens it was chosen for as the only real ones."""
        weights, chosen = route.dense(*x.shape[:2]), route.chosen(*x.shape[:2])
        children = state.children.get("targets") if state else None
        y, states = torch.zeros_like(x), []
        for index, layer in enumerate(self.layers):
            out = layer(x, ctx.and_mask(chosen[index]), children.child(str(index)) if children else None)
            # What a layer returns at masked tokens is unspecified, so it must not be multiplied by 0.
            y = y + torch.where(chosen[index, ..., None], out.y, 0) * weights[index, ..., None].to(x.dtype)
            states.append(out.state)
            losses.update(scoped(f"targets.{index}", out.losses))
            metrics.update(scoped(f"targets.{index}", out.metrics))
        return y, states


def _tree(router: State | None, targets: list[State | None]) -> State | None:
    """The states of a router and its targets as one, or None if there are none."""
    inner = {str(i): target for i, target in enumerate(targets) if target is not None}
    children = {"router": router, "targets": State(children=inner) if inner else None}
    present = {name: child for name, child in children.items() if child is not None}
    return State(children=present) if present else None
