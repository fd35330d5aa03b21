"""Layers around a layer that supply, for any of them, what it lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack as Options

import torch
from torch import Tensor
from torch.nn import functional as F

from altx.capabilities import adapted
from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output, StateOptions, advanced, scoped
from altx.layout import append, repack, reverse, take, unpack
from altx.state import Leaf, State


class _Adapter(Layer):
    """One layer inside."""

    kind: str

    def __init__(self, inner: Layer) -> None:
        super().__init__()
        self.inner = inner
        self.capabilities = adapted(inner.capabilities, self.kind)

    def init_state(self, batch: int, **options: Options[StateOptions]) -> State | None:
        return self.inner.init_state(batch, **options)

    def wrap(self, y: Tensor, out: Output, state: State | None) -> Output:
        """The inner layer's output with another y and state."""
        return Output(y, state, scoped("inner", out.losses), scoped("inner", out.metrics), out.exports)


class PadToMultiple(_Adapter):
    """Pads a sequence at its end to the length that the layer wants, and cuts the result."""

    kind = "pad"

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        length = x.shape[1]
        extra = -length % self.inner.capabilities.len_multiple
        if not extra:
            out = self.inner(x, ctx, state)
            return self.wrap(out.y, out, out.state)
        if ctx.cu_seqlens is not None or ctx.graph is not None:
            raise UnsupportedContext(
                f"cannot pad {length} packed or graph-connected tokens to a multiple of {length + extra}"
            )
        if state is not None and not self.inner.capabilities.masked:
            raise UnsupportedContext(
                f"{length} tokens are no multiple of {self.inner.capabilities.len_multiple}, and a layer that takes no "
                "mask would keep the padding in its state"
            )
        mask = ctx.mask if ctx.mask is not None else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

        def pad(value: Tensor | None) -> Tensor | None:
            return None if value is None else F.pad(value, (0, extra))

        padded = ctx.replace(
            # A causal layer never looks at what follows, so one that takes no mask needs none.
            mask=pad(mask) if self.inner.capabilities.masked or ctx.mask is not None else None,
            positions=pad(ctx.positions),
            reset=pad(ctx.reset),
            shared={k: F.pad(v, (0, 0) * (v.dim() - 2) + (0, extra)) for k, v in ctx.shared.items()},
        )
        out = self.inner(F.pad(x, (0, 0, 0, extra)), padded, state)
        exports = {name: value[:, :length] for name, value in out.exports.items()}
        return self.wrap(out.y[:, :length], replace(out, exports=exports), out.state)


class PrefixReplay(_Adapter):
    """Streams a causal layer that cannot: the state is every input so far, and each call runs them all again.

    O(T^2) over a sequence. Real tokens are stored compactly, so the layer needs no mask; it must take any
    length (see PadToMultiple).

    Args:
        inner: a causal layer.
        dim: width of its input.
    """

    kind = "replay"

    def __init__(self, inner: Layer, dim: int) -> None:
        super().__init__(inner)
        self.width = dim

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        weight = next(self.inner.parameters(), torch.empty(0))
        slots = capacity or 0
        leaves = {
            "x": torch.zeros(batch, slots, self.width, device=device or weight.device, dtype=dtype or weight.dtype),
            "positions": torch.zeros(batch, slots, device=device or weight.device, dtype=torch.int64),
            "reset": torch.zeros(batch, slots, device=device or weight.device, dtype=torch.bool),
        }
        spec = {name: Leaf(seq_dim=1, kind="kv") for name in leaves}
        return State(leaves, spec, seen=leaves["positions"].new_zeros(batch))

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if state is None and (ctx.mask is None or self.inner.capabilities.masked):
            out = self.inner(x, ctx)
            return self.wrap(out.y, out, None)
        start = state or self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        assert start.seen is not None
        ranks = ctx.ranks(x, start.seen)
        reset = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if ctx.reset is None else ctx.reset
        new = {"x": x, "positions": ranks if ctx.positions is None else ctx.positions, "reset": reset}
        leaves = {
            name: append(start[name], value, start.seen, ctx.mask, in_place=ctx.donate_state and state is not None)
            for name, value in new.items()
        }
        seen = advanced(start.seen, x, ctx)
        if not leaves["x"].shape[1]:
            # Nothing real yet.
            return Output(torch.zeros_like(x), State(leaves, start.spec, seen=seen) if state else None)
        past = Context(
            positions=leaves["positions"],
            reset=leaves["reset"] if self.inner.capabilities.reset else None,
            cross=ctx.cross,
            generator=ctx.generator,
        )
        out = self.inner(leaves["x"], past)
        own = ranks.clamp(min=0)
        exports = {name: take(value, own) for name, value in out.exports.items()}
        after = State(leaves, start.spec, seen=seen) if state else None
        return self.wrap(take(out.y, own), replace(out, exports=exports), after)


class Bidirectional(Layer):
    """A causal layer looking both ways: y = f(x) + reverse(g(reverse(x))), with f and g its two directions."""

    def __init__(self, forward_layer: Layer, backward_layer: Layer) -> None:
        super().__init__()
        self.forward_layer = forward_layer
        self.backward_layer = backward_layer
        self.capabilities = adapted(forward_layer.capabilities, "bidirectional")

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        causal = ctx.replace(causal=True)
        turned = causal.replace(
            positions=None if ctx.positions is None else reverse(ctx.positions, ctx.mask),
            shared={name: reverse(value, ctx.mask) for name, value in ctx.shared.items()},
        )
        there = self.forward_layer(x, causal)
        back = self.backward_layer(reverse(x, ctx.mask), turned)
        both = (("forward_layer", there), ("backward_layer", back))
        return Output(
            there.y + reverse(back.y, ctx.mask),
            None,
            {name: loss for path, out in both for name, loss in scoped(path, out.losses).items()},
            {name: value for path, out in both for name, value in scoped(path, out.metrics).items()},
            there.exports,
        )


class Unpack(_Adapter):
    """Gives a layer that knows no packed batches the same sequences as a padded one."""

    kind = "unpack"

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.cu_seqlens is None:
            out = self.inner(x, ctx, state)
            return self.wrap(out.y, out, out.state)
        if ctx.mask is not None or ctx.graph is not None:
            raise UnsupportedContext("a packed batch carries neither a mask nor a graph; leave the tokens out instead")
        cu = ctx.cu_seqlens
        padded, mask = unpack(x, cu)
        inner_ctx = ctx.replace(
            cu_seqlens=None,
            mask=mask,
            positions=None if ctx.positions is None else unpack(ctx.positions, cu)[0],
            reset=None if ctx.reset is None else unpack(ctx.reset, cu)[0],
            shared={name: unpack(value, cu)[0] for name, value in ctx.shared.items()},
        )
        out = self.inner(padded, inner_ctx, state)
        exports = {name: repack(value, mask) for name, value in out.exports.items()}
        return self.wrap(repack(out.y, mask), replace(out, exports=exports), out.state)
