"""What all recurrent mixers here have in common: the order of tokens, the state, long sequences in pieces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.masking import RealFirst, real_first
from altx.pieces import in_pieces
from altx.state import Leaf, State
from altx_linear_attention.short_conv import CONV, ShortConv


class Recurrent(Layer):
    """A mixer whose state has one size for ever.

    A subclass says what a row of the state holds, and what becomes of tokens. The inputs of each of its children that
    is a `ShortConv` are a leaf as well, named as the child.
    """

    @abstractmethod
    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        """Shape of one row of each leaf of the state, convolutions aside, and what it is."""

    @abstractmethod
    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        """y (B, T, D) in the order of `batch`, and every leaf of the state after it.

        Args:
            batch: the tokens, in each row the real ones first; T is not 0. `reset` and `mask` go with it.
            ctx: of the tokens as they were given.
            state: that before them; None is a fresh one.
        """

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        leaves = dict(self.leaves())
        for name, child in self.named_children():
            if isinstance(child, ShortConv):
                channels, _, taps = child.weight.shape
                leaves[name] = (taps - 1, channels), CONV
        shapes = {name: shape for name, (shape, _) in leaves.items()}
        spec = {name: leaf for name, (_, leaf) in leaves.items()}
        return State.zeros(batch, shapes, spec, next(self.parameters()), device, dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if not x.shape[1]:
            return Output(x, state)
        if out := in_pieces(self, x, ctx, state):
            return out
        batch = real_first(x, ctx)
        y, after = self.mix(batch, ctx, state)
        if state is not None:
            state = state.replace(**after, seen=advanced(state.seen, x, ctx))
        return Output(batch.restore(y), state)

    def convolve(self, name: str, x: Tensor, batch: RealFirst, state: State | None, after: dict[str, Tensor]) -> Tensor:
        """What the child `name`, a ShortConv or None, makes of x (B, T, C); its new leaf goes into `after`."""
        conv: ShortConv | None = getattr(self, name)
        if conv is None:
            return x
        y: Tensor
        y, after[name] = conv(x, batch, state[name] if state else None)
        return y


def real(x: Tensor, batch: RealFirst, instead: float = 0.0) -> Tensor:
    """x (B, T, ...), in the order of `batch`, with another number at its masked tokens."""
    if batch.mask is None:
        return x
    return x.masked_fill(~batch.mask.reshape(*batch.mask.shape, *[1] * (x.dim() - 2)), instead)
