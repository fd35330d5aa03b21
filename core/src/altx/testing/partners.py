"""The plain parts that others are checked with, so that a fault found is their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.capabilities import Capabilities, MemoryCapabilities
from altx.context import Context
from altx.layer import FRESH, Layer, Output, StateOptions, advanced
from altx.layout import append
from altx.memory import Attended, Memory, Read, attended, split_heads
from altx.spec import Heads
from altx.state import Leaf, State


class SelfAttention(Layer):
    """Attention of each token to itself, and to what a memory adds: that memory's "kv" by itself."""

    capabilities = Capabilities(bidirectional=True, packing=True, accepts_kv=True)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hands = Heads(query=2, kv=1, key_dim=dim // 4, value_dim=dim // 2)
        self.input = nn.Linear(dim, self.hands.width)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        assert self.hands is not None
        q, k, v = split_heads(self.input(x), self.hands)
        q = q * self.hands.key_dim**-0.5
        y = v.expand(-1, -1, self.hands.query, -1)
        if ctx.recall and x.shape[1]:
            far = ctx.recall(q, k, v, ctx)
            share = torch.sigmoid(far.weight - (q * k).sum(-1)) if far.share is None else far.share
            y = y + share[..., None].to(y.dtype) * (far.value - y)
        return Output(self.output(y.flatten(2)), state)


class LocalAttention(Layer):
    """An attention that begins anew every `size` tokens, while the memory that it asks goes on, as papers have it."""

    def __init__(self, inner: Layer, size: int) -> None:
        super().__init__()
        self.inner, self.size, self.capabilities = inner, size, inner.capabilities

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        start = (torch.arange(x.shape[1]) % self.size == 0).expand(len(x), -1)
        recall = ctx.recall
        assert recall is not None

        def whole(q: Tensor, k: Tensor, v: Tensor, here: Context) -> Attended:
            return recall(q, k, v, here.replace(reset=None))

        out: Output = self.inner(x, ctx.replace(reset=start, recall=whole), state)
        return out


class MovingAverage(Layer):
    """h_t = a h_{t-1} + (1 - a) W x_t per channel, y_t = h_t + x_t, with a = sigmoid(decay)."""

    capabilities = Capabilities(growth="constant", rollback="snapshot")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.input = nn.Linear(dim, dim)
        self.decay = nn.Parameter(torch.zeros(dim))

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        h = torch.zeros(batch, len(self.decay), device=device or self.decay.device, dtype=dtype or self.decay.dtype)
        return State({"h": h}, {"h": Leaf()}, seen=torch.zeros(batch, dtype=torch.int64, device=h.device))

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        start = state or self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        h, a, u, outputs = start["h"], torch.sigmoid(self.decay), self.input(x), []
        for t in range(x.shape[1]):
            before = h if ctx.reset is None else torch.where(ctx.reset[:, t, None], 0, h)
            new = a * before + (1 - a) * u[:, t]
            h = new if ctx.mask is None else torch.where(ctx.mask[:, t, None], new, h)
            outputs.append(h)
        y = torch.stack(outputs, 1) + x if outputs else x
        return Output(y, start.replace(h=h, seen=advanced(start.seen, x, ctx)) if state else None)


class Across(Layer):
    """Each token's softmax attention to the tokens of `ctx.cross`, and itself."""

    capabilities = Capabilities(bidirectional=True, cross=True)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.cross is None:
            return Output(x, state)
        tokens = ctx.cross.tokens.to(x.dtype)
        if tokens.dim() == 3:
            tokens = tokens[:, None].expand(-1, x.shape[1], -1, -1)
        seen = torch.cat([x[:, :, None], tokens], 2)
        score = (self.query(x)[:, :, None] @ seen.transpose(-1, -2)) / x.shape[-1] ** 0.5
        if ctx.cross.mask is not None:
            score = score.masked_fill(~F.pad(ctx.cross.mask, (1, 0), value=True)[:, None, None], -1e30)
        return Output(x + (score.softmax(-1) @ seen)[:, :, 0], state)


class Ledger(Memory):
    """Holds every key and value of its document: an attention that sees itself alone sees all with it."""

    capabilities = MemoryCapabilities(growth="linear", rollback="snapshot", compiles=False)

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        held = torch.zeros(batch, capacity or 0, self.heads.width, device=device, dtype=dtype)
        first = torch.zeros(batch, dtype=torch.int64, device=device)
        spec = {"held": Leaf(seq_dim=1, kind="kv"), "first": Leaf(kind="counter")}
        return State({"held": held, "first": first}, spec, seen=first)

    def _first(self, state: State, ctx: Context) -> Tensor:
        """(B,) where the document of the one token starts."""
        assert state.seen is not None
        if ctx.reset is None:
            return state["first"]
        begins = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
        return torch.where(begins.any(1), state.seen, state["first"])

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        assert q.shape[1] <= 1 and state.seen is not None, "chunk 1"
        slot = torch.arange(state["held"].shape[1], device=q.device)
        there = (slot >= self._first(state, ctx)[:, None]) & (slot < state.seen[:, None])
        _, k, v = split_heads(state["held"], self.heads)
        return Read(attended=attended(split_heads(q, self.heads)[0], k[:, None], v[:, None], there[:, None])), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, dict[str, Tensor]]:
        assert state.seen is not None
        held = append(state["held"], u, state.seen, ctx.mask)
        return state.replace(held=held, first=self._first(state, ctx), seen=advanced(state.seen, u, ctx)), {}


class Numbered(Layer):
    """The layer inside, told token numbers that are made of the tokens, and so go wherever these go."""

    def __init__(self, inner: Layer) -> None:
        super().__init__()
        self.inner = inner
        self.capabilities = replace(inner.capabilities, requires=frozenset())

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State | None:
        return self.inner.init_state(batch, **options)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        numbers = (x[..., 0].float().nan_to_num() * 8).round().long()
        out: Output = self.inner(x, ctx.replace(shared={**ctx.shared, "token_ids": numbers}), state)
        return out
