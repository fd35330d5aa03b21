"""`Routed(router, targets)`: a layer in which a router chooses, per token, among other layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Unpack

import torch
from torch import Tensor, nn

from altx import dispatch
from altx.capabilities import routed
from altx.context import Context
from altx.errors import CompositionError
from altx.layer import FRESH, Component, Layer, Output, StateOptions, advanced, scoped
from altx.router import Route, Router, Slots, Targets
from altx.state import Leaf, State


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
        targets: a TargetBank, or layers, which must honour a mask: a layer gets the tokens of its own, side by side,
            or where that cannot be the whole row under a mask, in graphs of torch.compile for one.
        kind: what the targets are, for the router to know.

    Raises:
        CompositionError: if there is nothing to choose among, or a target cannot have what the router gives it.
    """

    def __init__(self, router: Router, targets: TargetBank | Iterable[Layer], kind: str = "experts") -> None:
        super().__init__()
        self.router = router
        self.targets: nn.Module = targets if isinstance(targets, TargetBank) else nn.ModuleList(targets)
        self.kind = kind
        members = [self.targets] if isinstance(self.targets, TargetBank) else self.layers
        self.n = self.targets.n if isinstance(self.targets, TargetBank) else len(members)
        if not self.n:
            raise CompositionError("a router needs targets to choose among, and there are none")
        if router.capabilities.mixes and any(member.capabilities.growth != "none" for member in members):
            raise CompositionError("a router that mixes tokens needs targets without a state: mixtures are no sequence")
        self.capabilities = routed(router.capabilities, [member.capabilities for member in members])

    @property
    def layers(self) -> list[Layer]:
        """The targets where they are layers; empty for a bank."""
        return [target for target in self.targets.children() if isinstance(target, Layer)]

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State | None:
        router = self.router.init_state(batch, **options)
        states = [target.init_state(batch, **options) for target in self.layers]
        device = options.get("device") or next(self.parameters(), torch.empty(0)).device
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return _tree(router, states, torch.zeros(batch, self.n, dtype=torch.bool, device=device), seen)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        batch, length, _ = x.shape
        route = self.router.route(x, Targets(self.n, self.kind), ctx, state.child("router") if state else None)
        losses, metrics = scoped("router", route.losses), scoped("router", route.metrics)
        if route.slots is not None:
            y = self._mixed(x, ctx, route.slots)
            return Output(y, _tree(route.state, [], None, None) if state else None, losses, metrics)
        if isinstance(self.targets, TargetBank):
            plan = route.plan().cut()
            y = plan.combine(self.targets(plan.gather(x), plan.offsets), batch, length)
            return Output(y, _tree(route.state, [], None, None) if state else None, losses, metrics)
        chosen = route.chosen(batch, length)
        pending = state.leaves.get("pending") if state else None
        starts, pending = dispatch.resets(ctx, chosen, pending)
        before = state.children.get("targets") if state else None
        inner = [before.child(str(index)) if before else None for index in range(self.n)]
        contexts = [
            ctx.and_mask(chosen[index]).replace(reset=None if starts is None else starts[index])
            for index in range(self.n)
        ]
        if dispatch.countable(x, ctx):
            outs, y = self._side_by_side(x, route, chosen, contexts, inner)
        else:
            outs, y, weights = [], torch.zeros_like(x), route.dense(batch, length)
            for index, layer in enumerate(self.layers):
                outs.append(layer(x, contexts[index], inner[index]))
                # What a layer returns at masked tokens is unspecified, so it must not be multiplied by 0.
                own = torch.where(chosen[index, ..., None], outs[index].y, 0)
                y = y + own * weights[index, ..., None].to(x.dtype)
        for index, out in enumerate(outs):
            losses.update(scoped(f"targets.{index}", out.losses))
            metrics.update(scoped(f"targets.{index}", out.metrics))
        states = [out.state for out in outs]
        if state is None:
            return Output(y, None, losses, metrics)
        seen = None if state.seen is None else advanced(state.seen, x, ctx)
        return Output(y, _tree(route.state, states, pending, seen), losses, metrics)

    def _side_by_side(
        self, x: Tensor, route: Route, chosen: Tensor, contexts: list[Context], states: list[State | None]
    ) -> tuple[list[Output], Tensor]:
        """Every target on the tokens of its own only: outputs, and their weighted sum (B, T, D)."""
        batch, length = x.shape[:2]
        counts = chosen.sum(-1)
        # Asks the device, once for all targets, which costs less than what they would do in vain.
        host: list[list[int]] = counts.tolist()
        sizes = [sum(rows) for rows in host]
        # In order of target, row and time.
        target, token = chosen.flatten(1).nonzero(as_tuple=True)
        tokens, weights = token.split(sizes), route.dense(batch, length).flatten(1)[target, token].split(sizes)
        rows = [dispatch.Rows.of(tokens[i], counts[i], host[i], length) for i in range(self.n)]
        flat, outs = x.flatten(0, 1), []
        laid = dispatch.lay(flat, rows)
        total: Tensor | None = None
        for index, layer in enumerate(self.layers):
            out = layer(laid[index], rows[index].context(contexts[index]), states[index])
            y = rows[index].pick(out.y) * weights[index][:, None].to(out.y.dtype)
            total = y.new_zeros(len(flat), y.shape[1]) if total is None else total
            total.index_add_(0, tokens[index], y)
            outs.append(out)
        assert total is not None
        return outs, total.view(batch, length, -1)

    def _mixed(self, x: Tensor, ctx: Context, slots: Slots) -> Tensor:
        """What the targets make of mixtures of tokens: (B, T, D)."""
        if ctx.mask is not None:
            # A share of 0 does not keep out NaN.
            x = torch.where(ctx.mask[..., None], x, 0)
        batch, n, count, _ = slots.dispatch.shape
        mixtures = torch.einsum("bnst,btd->nbsd", slots.dispatch.to(x.dtype), x)
        if isinstance(self.targets, TargetBank):
            offsets = torch.arange(n + 1, device=x.device) * (batch * count)
            y = self.targets(mixtures.flatten(0, 2), offsets).view_as(mixtures)
        else:
            plain = Context(causal=False)
            y = torch.stack([layer(rows, plain).y for layer, rows in zip(self.layers, mixtures, strict=True)])
        return torch.einsum("bnst,nbsd->btd", slots.combine.to(y.dtype), y)


def _tree(
    router: State | None, targets: list[State | None], pending: Tensor | None, seen: Tensor | None
) -> State | None:
    """The states of a router and its targets as one, or None if there are none."""
    inner = {str(i): target for i, target in enumerate(targets) if target is not None}
    children = {"router": router, "targets": State(children=inner) if inner else None}
    present = {name: child for name, child in children.items() if child is not None}
    if not present:
        return None
    if not inner or pending is None:
        return State(children=present)
    return State({"pending": pending}, {"pending": Leaf(kind="counter")}, present, seen)
