"""`Recursion(router, body, depths)`: one stack of layers, applied to each token as often as a router says."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from altx import dispatch
from altx.capabilities import recursed
from altx.context import Context, SharedKV
from altx.errors import CompositionError
from altx.layer import FRESH, Layer, Output, StateOptions, advanced, scoped
from altx.router import Route, Router, Targets
from altx.state import Leaf, State


class Recursion(Layer):
    """The depths of one stack f as a router's targets: target i is f applied i + 1 times, with the same weights.

        h^0 = x,  h^(r+1) = f(h^r),  y_t = sum over the targets i of token t of weight_ti * h^(i+1)_t

    A `stepwise` router is asked at every depth, about the tokens that went on at the one before:

        h^(r+1) = h^r + weight_r f(h^r),  y = the sum of these steps

    Tokens that need no further application have left: at that depth no other token sees them, and their states hold
    ("recursion-wise caching", Bae et al. 2025, Mixture-of-Recursions, arXiv:2507.10524, section 2.2.2). Those that
    are left keep the positions that they have in the whole sequence.

    With `kv_sharing` a layer's keys and values are those of the first application at all depths ("recursive KV
    sharing", ibid.): a token that is left sees there, from where it stands, all that took part in the first, and only
    the first has a state.

    f is a stack with norms and residuals of its own, so y is to be added to x as it is.

    Args:
        router: the router, which keeps no state if it is stepwise.
        body: f. It must honour a mask, and gets the tokens that are left, side by side, or where that cannot be the
            whole row under a mask, as with `Routed`.
        depths: how often f may be applied, N.
        kv_sharing: see above; what carries a state in f must declare `shares_kv`.

    Losses of f are summed over the depths, its metrics averaged; both of a stepwise router are summed. Metrics, over
    real tokens: "mean_depth", and "active" (N,), how many take part in each application.
    """

    def __init__(self, router: Router, body: Layer, depths: int, kv_sharing: bool = False) -> None:
        super().__init__()
        if kv_sharing and not body.capabilities.shares_kv:
            raise CompositionError("with kv_sharing every layer that carries a state must declare shares_kv")
        self.router = router
        self.body = body
        self.n = depths
        self.kv_sharing = kv_sharing
        self.capabilities = recursed(router.capabilities, body.capabilities)

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State | None:
        router = self.router.init_state(batch, **options)
        count = 1 if self.kv_sharing else self.n
        states = [self.body.init_state(batch, **options) for _ in range(count)]
        device = options.get("device") or next(self.parameters(), torch.empty(0)).device
        pending = torch.zeros(batch, count, dtype=torch.bool, device=device)
        return _tree(router, states, pending, torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        batch, length, _ = x.shape
        if ctx.positions is None:
            ctx = ctx.replace(positions=ctx.ranks(x, state.seen if state else None).expand(batch, -1))
        left = torch.ones(batch, length, dtype=torch.bool, device=x.device) if ctx.mask is None else ctx.mask
        real, own, held = left, state.child("router") if state else None, state.child("depths") if state else None
        stepwise = self.router.capabilities.stepwise
        h, y, outs, tables, pendings, active = x, torch.zeros_like(x), [], [], [], []
        route: Route | None = None
        kv = SharedKV({}) if self.kv_sharing else None
        for depth in range(self.n):
            if route is None or stepwise:
                route = self.router.route(h, Targets(self.n, "depths", depth=depth), ctx.and_mask(left), own)
                tables.append(route)
                chosen, weights = route.chosen(batch, length), route.dense(batch, length)
            left = chosen[depth:].any(0)
            active.append(left.sum())
            here, before = ctx.and_mask(left).replace(shared_kv=kv), None
            if kv is None or kv.own is None:
                pending = state.leaves["pending"][:, depth : depth + 1] if state and "pending" in state.leaves else None
                starts, owed = dispatch.resets(ctx, left[None], pending)
                here = here.replace(reset=None if starts is None else starts[0])
                before = held.child(str(depth)) if held else None
                pendings.append(owed)
            # The first tells of losses also when nobody takes part; but in a stream a step costs what it computes.
            out = self._applied(h, here, left, before, idle=not self.training and (depth > 0 or state is not None))
            outs.append(out)
            if kv is not None and kv.own is None:
                kv = SharedKV(kv.kept, (left.cumsum(1) - 1).clamp(min=0))
            step = torch.where(chosen[depth, ..., None], out.y, 0) * weights[depth, ..., None].to(x.dtype)
            y = y + step
            h = h + step if stepwise else out.y
        losses, metrics = self._measured(tables, outs, torch.stack(active), real)
        if state is None:
            return Output(y, None, losses, metrics)
        seen = None if state.seen is None else advanced(state.seen, x, ctx)
        pending = torch.cat([each for each in pendings if each is not None], 1) if pendings[0] is not None else None
        return Output(y, _tree(tables[-1].state, [out.state for out in outs], pending, seen), losses, metrics)

    def _applied(self, h: Tensor, ctx: Context, left: Tensor, state: State | None, idle: bool) -> Output:
        """f of the tokens that are left, with h (B, T, D) as it is elsewhere; if it may be `idle`, not without any."""
        if not dispatch.countable(h, ctx):
            if idle and not (h.is_meta or torch.compiler.is_compiling()) and not bool(left.any()):
                return Output(h, state)
            out = self.body(h, ctx, state)
            return Output(torch.where(left[..., None], out.y, h), out.state, out.losses, out.metrics)
        counts = left.sum(1)
        # Asks the device, once for each depth, which costs less than what it would do in vain.
        host: list[int] = counts.tolist()
        if idle and not any(host):
            return Output(h, state)
        token, flat = left.flatten().nonzero().flatten(), h.flatten(0, 1)
        rows = dispatch.Rows.of(token, counts, host, h.shape[1])
        out = self.body(rows.lay(flat), rows.context(ctx), state)
        y = flat.index_copy(0, token, rows.pick(out.y).to(flat.dtype)).view_as(h)
        return Output(y, out.state, out.losses, out.metrics)

    def _measured(
        self, routes: list[Route], outs: list[Output], active: Tensor, real: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and metrics of all depths together."""
        losses: dict[str, Tensor] = {}
        metrics = {"mean_depth": active.sum() / real.sum().clamp(min=1), "active": active}
        for path, parts, share in (("router", routes, 1), ("body", outs, self.n)):
            for part in parts:
                for name, loss in scoped(path, part.losses).items():
                    losses[name] = losses[name] + loss if name in losses else loss
                for name, value in scoped(path, part.metrics).items():
                    metrics[name] = metrics[name] + value / share if name in metrics else value / share
        return losses, metrics


def _tree(
    router: State | None, depths: list[State | None], pending: Tensor | None, seen: Tensor | None
) -> State | None:
    """The states of a router and of each depth as one, or None if there are none."""
    inner = {str(i): state for i, state in enumerate(depths) if state is not None}
    children = {"router": router, "depths": State(children=inner) if inner else None}
    present = {name: child for name, child in children.items() if child is not None}
    if not present:
        return None
    leaves = {"pending": pending} if inner and pending is not None else {}
    return State(leaves, {name: Leaf(kind="counter") for name in leaves}, present, seen if inner else None)
