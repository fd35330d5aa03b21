"""What all layers here have in common: the order of tokens, the state, the token shift, long sequences in pieces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.masking import RealFirst, real_first
from altx.pieces import in_pieces
from altx.state import Leaf, State
from altx_rwkv.kernels.token_shift import token_shift

SHIFT = Leaf(kind="conv")


class Recurrent(Layer):
    """A layer that mixes each token with the one before, and whose state has one size for ever.

    The state holds the last real token, as leaf `shift` (B, D), and what a subclass adds.
    """

    exported: tuple[str, ...] = ()
    """Names of what `mix` exports, each (B, T, D)."""

    read: tuple[str, ...] = ()
    """Names of what it reads of what earlier layers exported."""

    def param_groups(self) -> dict[str, dict[str, Any]]:
        """As in the authors' code: nothing decays but the matrices of linear maps."""
        return {name: {"weight_decay": 0.0} for name, _ in self.named_parameters() if not name.endswith(".weight")}

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        """Shape of one row of each leaf of the state beside `shift`, and what it is."""
        return {}

    @property
    @abstractmethod
    def dim(self) -> int:
        """D, the model width."""

    @abstractmethod
    def mix(
        self, batch: RealFirst, shared: Mapping[str, Tensor], state: State | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """y (B, T, D), the leaves of the state after it, and exports (B, T, ...), in the order of `batch`.

        Args:
            batch: x (B, T, D), in each row the real tokens first, and what goes with it; T is not 0.
            shared: what earlier layers exported, in the order of `batch`.
            state: that before them; None is a fresh one.
        """

    def fresh(self, zeros: State) -> State:
        """The state before the first token, from zeros, which may be written to."""
        return zeros

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        leaves = {"shift": ((self.dim,), SHIFT), **self.leaves()}
        shapes = {name: shape for name, (shape, _) in leaves.items()}
        spec = {name: leaf for name, (_, leaf) in leaves.items()}
        return self.fresh(State.zeros(batch, shapes, spec, next(self.parameters()), device, dtype))

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if not x.shape[1]:
            return Output(x, state, exports={name: x for name in self.exported})
        if out := in_pieces(self, x, ctx, state):
            return out
        batch = real_first(x, ctx)
        shared = {name: real_first(ctx.shared[name], ctx).x for name in self.read}
        y, after, exports = self.mix(batch, shared, state)
        if state is not None:
            state = state.replace(**after, shift=last_token(batch, state["shift"]), seen=advanced(state.seen, x, ctx))
        exports = {name: batch.restore(exported) for name, exported in exports.items()}
        return Output(batch.restore(y), state, exports=exports)


def shifted(batch: RealFirst, mix: Tensor, state: State | None) -> tuple[Tensor, ...]:
    """Mixtures of each token with the one before, mix (N, D) saying how much of that goes into each: N of (B, T, D)."""
    past = state["shift"] if state else None
    return token_shift(batch.x, mix, initial_state=past, reset=batch.reset).unbind()


def real(x: Tensor, batch: RealFirst) -> Tensor:
    """x (B, T, ...), in the order of `batch`, with zeros at its masked tokens."""
    if batch.mask is None:
        return x
    return x.masked_fill(~batch.mask.reshape(*batch.mask.shape, *[1] * (x.dim() - 2)), 0)


def token_before(batch: RealFirst, state: State | None) -> Tensor:
    """The token before each of batch.x (B, T, D), zeros where a sequence starts."""
    x = batch.x
    first = state["shift"][:, None].to(x.dtype) if state else torch.zeros_like(x[:, :1])
    before = first if x.shape[1] == 1 else torch.cat([first, x[:, :-1]], 1)
    return before if batch.reset is None else before.masked_fill(batch.reset[..., None], 0)


def last_token(batch: RealFirst, past: Tensor) -> Tensor:
    """The last real token of each row (B, D), which is `past` where there is none, in its dtype."""
    x = batch.x
    if batch.lengths is None:
        return x[:, -1].to(past.dtype)
    index = (batch.lengths - 1).clamp(min=0)
    last = x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
    return last.to(past.dtype).where(batch.lengths[:, None] > 0, past)
