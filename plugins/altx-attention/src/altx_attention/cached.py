"""What layers of attention share: tokens in order, the state, and who sees whom.

B rows, T tokens, S slots.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from altx.context import Context, Cross
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output
from altx.layout import take
from altx.masking import RealFirst, real_first
from altx.memory import Attended
from altx.state import State
from altx_attention.cache import GrowingCache, WindowCache
from altx_attention.documents import places

Recall = Callable[[Tensor, Tensor, Tensor], Attended]
"""What a memory holds for queries, keys and values of each row's tokens, real ones first."""


class Places(TypedDict):
    """Arguments of the op that say what a query sees, but for the window."""

    causal: bool
    offset: Tensor | None
    document: Tensor | None
    slot_document: Tensor | None


class Kept(NamedTuple):
    """What later applications look up of the first.

    Args:
        slots: (B, S, ...) by name.
        where: what each token of the call saw of them.
        position: (B, T) of the call's tokens, each row's real ones first.
    """

    slots: Mapping[str, Tensor]
    where: Places
    position: Tensor


class CachedAttention(Layer):
    """Attention to what earlier tokens left in a cache, or to the tokens of the call.

    Args:
        cache: what a token leaves behind, and for how long.
    """

    def __init__(self, cache: GrowingCache | WindowCache) -> None:
        super().__init__()
        self.cache = cache

    @abstractmethod
    def project(
        self,
        x: Tensor,
        position: Tensor,
        recall: Recall | None = None,
        cross: Cross | None = None,
        leaves: bool = True,
    ) -> tuple[list[Tensor], dict[str, Tensor], Attended | None]:
        """What tokens x (B, T, ...) at `position` (B or 1, T) ask with, and what they leave in the cache, by name,
        unless nobody wants the `leaves`; and their attention beyond the sequence: to what a memory recalls, or to
        `cross`, with tokens (B, T or 1, S, dim) and a mask (B, 1, S) or None."""

    @abstractmethod
    def attend(self, queries: list[Tensor], slots: Mapping[str, Tensor], where: Places, far: Attended | None) -> Tensor:
        """(B, T, width of all heads' values) from the first of the queries; `slots` are (B, S, ...)."""

    @abstractmethod
    def output(self, y: Tensor, queries: list[Tensor]) -> Tensor:
        """(B, T, dim) from what queries have attended to."""

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        weight = next(self.parameters())
        return self.cache.empty(batch, capacity, device or weight.device, dtype or weight.dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if state is not None and not ctx.causal:
            raise UnsupportedContext(
                "attention that looks both ways needs the whole sequence at once, so it cannot continue a state",
                hint="leave the state out, or use a causal context",
            )
        if not x.shape[1]:
            return Output(x, state)
        tokens = real_first(x, ctx)
        if ctx.shared_kv is not None and ctx.shared_kv.own is not None:
            return self._again(tokens, ctx, ctx.shared_kv.kept[self], ctx.shared_kv.own)
        stand = places(tokens, ctx, state.seen if state else None, self.cache.document(state) if state else None)
        queries, leaves, far = self.project(tokens.x, stand.position, _asked(ctx, tokens), _across(ctx))
        where = Places(causal=ctx.causal, offset=None, document=stand.document, slot_document=stand.document)
        if state is not None:
            assert stand.document is not None
            state, slots = self.cache.extend(state, leaves, stand.document, tokens.mask, donated=ctx.donate_state)
            leaves = {name: leaf.to(leaves[name].dtype) for name, leaf in slots.leaves.items()}
            where["offset"], where["slot_document"] = slots.offset, slots.document
        elif tokens.mask is not None and not ctx.causal:
            # Masked tokens come last, where those that look back only do not see them.
            document = stand.index.expand(len(x), -1) * 0 if stand.document is None else stand.document
            where["document"], where["slot_document"] = document, document.where(tokens.mask, -1)
        if ctx.shared_kv is not None:
            ctx.shared_kv.kept[self] = Kept(leaves, where, stand.position.expand(len(x), -1))
        return Output(tokens.restore(self.output(self.attend(queries, leaves, where, far), queries)), state)

    def _again(self, tokens: RealFirst, ctx: Context, kept: Kept, own: Tensor) -> Output:
        """Attention to what the first application saw; each token stands where its `own` (B, T) stood in that."""
        own = own if tokens.back is None else take(own, tokens.back.argsort(1))
        count = kept.position.shape[1]
        # Those that are masked stand behind all others.
        place = own if tokens.mask is None else own.where(tokens.mask, count)

        def spread(value: Tensor) -> Tensor:
            """(B, T, ...) as (B, S, ...), with queries of nobody between, which costs less than it would to tell every
            kernel where each query stands."""
            index = place.reshape(*place.shape, *[1] * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
            return value.new_zeros(len(value), count + 1, *value.shape[2:]).scatter(1, index, value)[:, :count]

        position, asked = take(kept.position, own), _asked(ctx, tokens)
        queries, _, far = self.project(tokens.x, position, asked, _across(ctx), leaves=False)
        if far is not None:
            far = Attended(spread(far.value), spread(far.weight), None if far.share is None else spread(far.share))
        y = take(self.attend([spread(queries[0])], kept.slots, kept.where, far), own)
        return Output(tokens.restore(self.output(y, queries)))


def _across(ctx: Context) -> Cross | None:
    """The second sequence that the context brings, or each token's own one, for tokens in their new order."""
    if ctx.cross is None:
        return None
    tokens, mask = ctx.cross.tokens, ctx.cross.mask
    if tokens.dim() == 4:
        return Cross(real_first(tokens.flatten(2), ctx).x.unflatten(2, tokens.shape[2:]))
    if mask is not None:
        tokens, mask = tokens.masked_fill(~mask[..., None], 0), mask[:, None]
    return Cross(tokens[:, None], mask)


def _asked(ctx: Context, tokens: RealFirst) -> Recall | None:
    """The memory that the context brings, for tokens in their new order."""
    recall = ctx.recall
    if recall is None:
        return None
    here = ctx.replace(mask=tokens.mask, reset=tokens.reset, positions=None, recall=None)
    return lambda q, k, v: recall(q, k, v, here)
