"""Deliberately wrong components. Each must fail exactly the check meant for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from altx import recipe, registry
from altx.capabilities import Capabilities, RouterCapabilities
from altx.compose import build
from altx.config import ModelConfig
from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output, advanced
from altx.model import Model
from altx.resolve import Blueprint, resolve
from altx.routed import Routed
from altx.router import Route, Router, Targets
from altx.state import Leaf, State
from altx.testing.partners import MovingAverage, SelfAttention

DIM = 16


class LooksAhead(MovingAverage):
    """Every token also sees the one after it."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx, state)
        return replace(out, y=out.y + torch.cat([x[:, 1:], x[:, :1] * 0], 1))


class IgnoresState(MovingAverage):
    """Hands a state on, counts its tokens, and never looks into it."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx, state and state.replace(h=torch.zeros_like(state["h"])))
        # An empty call must leave what it was given.
        return out if state is None or x.shape[1] else Output(out.y, state)


class MixesRows(MovingAverage):
    """Adds the mean over the batch."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        return super().forward(x + x.mean(0, keepdim=True), ctx, state)


class WrongBatchAxis(MovingAverage):
    """Keeps its state as (D, B) and declares the rows on axis 0."""

    def init_state(self, batch: int, **options: object) -> State:
        state = super().init_state(batch, **options)  # type: ignore[arg-type]
        return state.replace(h=state["h"].T)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        inner = super().init_state(x.shape[0]).to(dtype=x.dtype)
        out = super().forward(x, ctx, state.replace(h=state["h"].T) if state else inner)
        return replace(out, state=out.state and out.state.replace(h=out.state["h"].T))


class PaddingAdvances(MovingAverage):
    """The state decays at masked tokens too."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.mask is None:
            return super().forward(x, ctx, state)
        out = super().forward(torch.where(ctx.mask[..., None], x, 0), ctx.replace(mask=None), state)
        before = state.seen if state else None
        return replace(out, state=out.state and out.state.replace(seen=advanced(before, x, ctx)))


class PackingLeaks(MovingAverage):
    """Declares packing and runs on over the boundaries."""

    capabilities = Capabilities(growth="constant", rollback="snapshot", packing=True)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.cu_seqlens is None:
            return super().forward(x, ctx, state)
        out = super().forward(x, ctx.replace(cu_seqlens=None))
        return replace(out, state=state)


class StepDiffers(MovingAverage):
    """A single token goes another way, 1e-2 beside."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx, state)
        return replace(out, y=out.y + 1e-2) if x.shape[1] == 1 and state is not None else out


class NoGradient(MovingAverage):
    """Owns a parameter that reaches no output."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.forgotten = nn.Parameter(torch.ones(dim))


class SharesMemory(MovingAverage):
    """Two parameters are views of one tensor."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.copied = nn.Parameter(self.decay.data.view(-1))

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx, state)
        return replace(out, y=out.y * (1 + self.copied))


class TouchesGlobalRng(MovingAverage):
    """Draws a number it does not use."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        torch.rand(())
        return super().forward(x, ctx, state)


class WrongAtOddSplits(MovingAverage):
    """Declares any split, and forgets half of its state when continued at an odd place."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if state is not None and x.shape[1] and state.seen is not None:
            odd = (state.seen % 2 == 1)[:, None]
            state = state.replace(h=torch.where(odd, state["h"] / 2, state["h"]))
        return super().forward(x, ctx, state)


class WritesInput(MovingAverage):
    """Normalises x in place, to what it was."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x.clone(), ctx, state)
        with torch.no_grad():
            x += 1e-3
        return out


class CountsPadding(MovingAverage):
    """Its `seen` counts masked tokens."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx, state)
        if out.state is None or state is None:
            return out
        return replace(out, state=out.state.replace(seen=advanced(state.seen, x, FRESH)))


class IgnoresReset(MovingAverage):
    """Declares resets and runs on."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        return super().forward(x, ctx.replace(reset=None), state)


class ResetsAtPadding(MovingAverage):
    """Takes a reset at a masked token for one."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.mask is None or ctx.reset is None or not x.shape[1]:
            return super().forward(x, ctx, state)
        # Late enough that the next real token starts afresh.
        late = torch.cat([ctx.reset[:, :1], ctx.reset[:, 1:] | (ctx.reset & ~ctx.mask)[:, :-1]], 1)
        return super().forward(x, ctx.replace(reset=late), state)


class HidesALoss(MovingAverage):
    """Returns a loss that it does not declare."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        return replace(super().forward(x, ctx, state), losses={"hidden": self.decay.square().sum()})


class ClaimsAnExport(MovingAverage):
    """Declares an export that it does not make."""

    capabilities = Capabilities(growth="constant", rollback="snapshot", provides=frozenset({"first_value"}))


class CropsWrongly(MovingAverage):
    """Declares a sequence axis on a state that has none, so that a crop is accepted."""

    capabilities = Capabilities(growth="constant", rollback="crop")

    def init_state(self, batch: int, **options: object) -> State:
        state = super().init_state(batch, **options)  # type: ignore[arg-type]
        return State(state.leaves, {"h": Leaf(seq_dim=1)}, seen=state.seen)


class MisstatesGrowth(MovingAverage):
    """Declares a growing state."""

    capabilities = Capabilities(growth="none", rollback="snapshot")


class OverstatesGrowth(MovingAverage):
    """Declares that a constant state grows."""

    capabilities = Capabilities(growth="linear", rollback="snapshot")


class DetachesState(MovingAverage):
    """Cuts the gradient between tokens, so that it is not the derivative."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx, state)
        return replace(out, y=out.y.detach() * 0.5 + out.y * 0.5)


class SumsNeighbours(MovingAverage):
    """Right: adds the inputs at the other ends of a token's edges."""

    capabilities = replace(MovingAverage.capabilities, graph="optional")

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx, state)
        if ctx.graph is None:
            return out
        self.check(x, ctx)
        source, target = ctx.graph.edge_index
        if ctx.mask is not None:
            both = ctx.mask.flatten()[ctx.graph.edge_index].all(0)
            source, target = source[both], target[both]
        nodes = x.flatten(0, 1)
        return replace(out, y=out.y + torch.zeros_like(nodes).index_add(0, target, nodes[source]).view_as(x))

    def check(self, x: Tensor, ctx: Context) -> None:
        assert ctx.graph
        source, target = ctx.graph.edge_index
        count, length = x.shape[0] * x.shape[1], x.shape[1]
        outside = (ctx.graph.edge_index < 0) | (ctx.graph.edge_index >= count)
        if outside.any() or (source // length != target // length).any() or (ctx.causal and (source > target).any()):
            raise UnsupportedContext("a bad edge")


class NeedsNeighbours(SumsNeighbours):
    """Right: will not work without a graph."""

    capabilities = Capabilities(streaming="none", graph="required", compiles=False)  # it looks at values to refuse

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        assert ctx.graph is not None
        return super().forward(x, ctx, state)


class IgnoresGraph(MovingAverage):
    """Declares that it reads a graph, and does not."""

    capabilities = SumsNeighbours.capabilities


class SeesMaskedNeighbours(SumsNeighbours):
    """Sums over edges from masked tokens too."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx.replace(graph=None), state)
        edges = super().forward(x, ctx.replace(mask=None))
        return replace(out, y=out.y + edges.y - super().forward(x, ctx.replace(mask=None, graph=None)).y)


class TakesAnyEdge(SumsNeighbours):
    """Looks at no edge."""

    def check(self, x: Tensor, ctx: Context) -> None:
        pass


class CountingRouter(Router):
    """Top-1 by a linear gate; counts load over all tokens, padding included."""

    capabilities = RouterCapabilities(causal=True, bidirectional=True)
    count_padding = True

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, n)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        weight, target = self.gate(x).softmax(-1).max(-1)
        real = ctx.mask if ctx.mask is not None else torch.ones_like(target, dtype=torch.bool)
        counted = torch.ones_like(real) if self.count_padding else real
        load = torch.zeros(targets.n, dtype=x.dtype).index_add(0, target.reshape(-1), counted.reshape(-1).to(x.dtype))
        token = torch.arange(target.numel())
        target = torch.where(real, target, -1)
        return Route(targets.n, token, target.reshape(-1), weight.reshape(-1), metrics={"load": load})


def routed(router: Router) -> Layer:
    return Routed(router, [MovingAverage(DIM) for _ in range(3)], "mixers")


def feed_forward_blueprint() -> Blueprint:
    config: ModelConfig = recipe.load({"dim": DIM, "blocks": [{"sublayers": [{"feed_forward": "altx:swiglu"}]}]})
    return resolve(config, registry.Registry(entry_points=[]))


def reinitialising_composer(blueprint: Blueprint) -> Model:
    """Builds the model and then initialises every linear layer its own way, as many libraries do."""
    model = build(blueprint)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    return model


class HandsOverPadding(SelfAttention):
    """Tells a memory nothing of masked tokens."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        return super().forward(x, ctx.replace(mask=None), state)


class IgnoresTheGate(SelfAttention):
    """Joins a memory's keys by their weight, whatever share its gate leaves them."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        recall = ctx.recall
        if recall:
            ctx = ctx.replace(recall=lambda q, k, v, here: recall(q, k, v, here)._replace(share=None))
        return super().forward(x, ctx, state)


class ForgetsTheFirst(MovingAverage):
    """Declares that it is the same again for some of the tokens, and sees only those."""

    capabilities = replace(MovingAverage.capabilities, shares_kv=True)


class SeesTheLater(MovingAverage):
    """Of the tokens that are applied again, others see what they are then."""

    capabilities = replace(MovingAverage.capabilities, shares_kv=True)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.shared_kv and ctx.shared_kv.own is None:
            ctx.shared_kv.kept[self] = x
        elif ctx.shared_kv:
            first = ctx.shared_kv.kept[self]
            x, ctx = first if ctx.mask is None else x.where(ctx.mask[..., None], first), ctx.replace(mask=None)
        return super().forward(x, ctx, state)


SPECIMENS = {
    "kv-sharing": ForgetsTheFirst,
    "kv-sharing (later)": SeesTheLater,
    "recall": HandsOverPadding,
    "recall (gate)": IgnoresTheGate,
    "causality": LooksAhead,
    "halves": IgnoresState,
    "rows": MixesRows,
    "select": WrongBatchAxis,
    "padding": PaddingAdvances,
    "packing": PackingLeaks,
    "steps": StepDiffers,
    "gradients": NoGradient,
    "separate-parameters": SharesMemory,
    "global-rng": TouchesGlobalRng,
    "splits": WrongAtOddSplits,
    "unmutated": WritesInput,
    "seen": CountsPadding,
    "reset": IgnoresReset,
    "reset (padding)": ResetsAtPadding,
    "rollback": CropsWrongly,
    "growth": MisstatesGrowth,
    "declared": HidesALoss,
    "declared (export)": ClaimsAnExport,
    "growth (linear)": OverstatesGrowth,
    "gradcheck": DetachesState,
    "graph": IgnoresGraph,
    "graph (masked)": SeesMaskedNeighbours,
    "graph-refused": TakesAnyEdge,
}
"""The check that each must fail, and no other."""
