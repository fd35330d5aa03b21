"""What stands around a layer in a model: the norm and the residual, and running layers one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Unpack

from torch import Tensor, nn

from altx.capabilities import meet
from altx.context import Context
from altx.layer import FRESH, Layer, Output, StateOptions, scoped
from altx.state import State

NORMS = ("rms", "layer", "none")

Around = Callable[[int, Tensor, Callable[[Tensor], Output]], Output]


def make_norm(kind: str, dim: int, eps: float) -> nn.Module:
    """RMSNorm (Zhang & Sennrich 2019), LayerNorm (Ba et al. 2016) or nothing, over the last axis."""
    if kind == "rms":
        return nn.RMSNorm(dim, eps=eps)
    if kind == "layer":
        return nn.LayerNorm(dim, eps=eps)
    return nn.Identity()


class Residual(Layer):
    """y = x + body(norm(x)), pre-norm. A body that includes the norm or the residual is given neither twice."""

    def __init__(self, body: Layer, dim: int, norm: str = "rms", eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.Identity() if "norm" in body.capabilities.includes else make_norm(norm, dim, eps)
        self.body = body
        self.skip = "residual" not in body.capabilities.includes
        self.capabilities = meet([body.capabilities])

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State | None:
        return self.body.init_state(batch, **options)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if self.skip and state is not None and (whole := self.body.residual(x, self.norm, ctx, state)):
            y, out = whole.y, whole
        else:
            out = self.body(self.norm(x), ctx, state)
            y = x + out.y if self.skip else out.y
        return Output(y, out.state, scoped("body", out.losses), scoped("body", out.metrics), out.exports)


class Stack(Layer):
    """Layers one after another; what one exports, the later ones find in `ctx.shared`."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        layers = list(layers)
        self.layers = nn.ModuleList(layers)
        self.capabilities = meet([layer.capabilities for layer in layers])

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State | None:
        states = [layer.init_state(batch, **options) for layer in self.layers if isinstance(layer, Layer)]
        return _stack_state(states)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        return self.run(x, ctx, state)

    def run(self, x: Tensor, ctx: Context, state: State | None, around: Around | None = None) -> Output:
        """As `forward`, with something around every layer.

        Args:
            around: called for each layer in turn with its index, what it is given and what runs it.
        """
        states: list[State | None] = []
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        exports: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            held = state.child(str(index)) if state else None
            out = around(index, x, partial(layer, ctx=ctx, state=held)) if around else layer(x, ctx, held)
            x = out.y
            states.append(out.state)
            if out.losses or out.metrics:
                losses.update(scoped(f"layers.{index}", out.losses))
                metrics.update(scoped(f"layers.{index}", out.metrics))
            if out.exports:
                exports.update(out.exports)
                ctx = ctx.replace(shared={**ctx.shared, **out.exports})
        return Output(x, _stack_state(states) if state else None, losses, metrics, exports)


def _stack_state(states: list[State | None]) -> State | None:
    children = {str(index): state for index, state in enumerate(states) if state is not None}
    return State(children=children) if children else None
