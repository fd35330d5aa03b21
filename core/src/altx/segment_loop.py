"""A memory around the whole stack of blocks: its tokens stand before and after each segment of the sequence.

The recurrence of Bulatov et al. 2022 (Recurrent Memory Transformer, arXiv:2207.06881, equations 1 to 3):

    [_, y_s, u_s] = stack([before(m_{s-1}); x_s; after(m_{s-1})]),    m_s = write(u_s)

for the s-th segment x_s. Only the memory goes from one segment to the next. It may have a part in every block, too:
what enters one is what the memory makes of it, and what leaves one where the tokens after a segment stand is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from altx.block import Stack
from altx.capabilities import segmented
from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output, advanced, scoped
from altx.memory import Memory, added
from altx.segments import Piece, gathered, split
from altx.state import Leaf, State


class SegmentLoop(Layer):
    """Runs layers segment by segment, with the memory's tokens around each.

    Within a segment tokens stream as they come; those after it run when its last token has come, and the next segment
    starts with the layers' state empty. `seen` counts the sequence's own tokens.

    Args:
        inner: the layers.
        memory: read with no queries for its `tokens`, and `after`; written with what became of those after the
            segment, or of those before it if there are none after.
    """

    def __init__(self, inner: Layer, memory: Memory) -> None:
        super().__init__()
        self.inner = inner
        self.memory = memory
        self.capabilities = segmented(inner.capabilities, memory.capabilities)

    @property
    def size(self) -> int:
        """Tokens of a segment."""
        return self.memory.capabilities.chunk

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        memory = self.memory.init_state(batch, device=device, dtype=dtype)
        inner = self._fresh(batch, device, dtype)
        count = torch.zeros(batch, dtype=torch.int64, device=device or next(self.parameters()).device)
        children = {"memory": memory} if inner is None else {"inner": inner, "memory": memory}
        return State({"offset": count}, {"offset": Leaf(kind="counter")}, children, count)

    def _fresh(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> State | None:
        """The layers' state at the start of a segment, with room for all of it."""
        room = self.size + self.memory.capabilities.tokens
        return self.inner.init_state(batch, capacity=room, device=device, dtype=dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        self._refuse(ctx, state)
        if not x.shape[1]:
            return Output(x, state)
        start = self.memory.init_state(len(x), device=x.device, dtype=x.dtype)
        memory = state.children["memory"] if state else start
        inner = state.child("inner") if state else None
        ys: list[tuple[Piece, Tensor]] = []
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        offset = state["offset"].tolist() if state else [0] * len(x)
        for piece, part in split(x, ctx, offset, self.size):
            if state and any(piece.first):
                inner = _rows(piece.first, self._fresh(len(x), x.device, x.dtype), inner)
            memory = _rows(piece.reset, start, memory) or memory
            out, memory, new_losses = self._run(part, piece, ctx, inner, memory)
            inner, offset = out.state if state else None, piece.offset
            ys.append((piece, out.y))
            share = piece.ctx.share_of(ctx, part, x)
            for into, values in ((losses, new_losses), (metrics, out.metrics)):
                added(into, {name: value * share for name, value in values.items()})
        if not ys:
            # Nothing real has come.
            return Output(torch.zeros_like(x), state)
        y = gathered(ys, x)
        if state is None:
            return Output(y, None, losses, metrics)
        children = {"memory": memory} if inner is None else {"inner": inner, "memory": memory}
        counted = {"offset": torch.tensor(offset, device=x.device)}
        return Output(y, State(counted, state.spec, children, advanced(state.seen, x, ctx)), losses, metrics)

    def _run(
        self, part: Tensor, piece: Piece, ctx: Context, inner: State | None, memory: State
    ) -> tuple[Output, State, dict[str, Tensor]]:
        """A piece of segments, with the memory's tokens where one starts and ends; the memory written where one ends.

        Returns:
            The layers' output for the piece itself, the memory, and losses.
        """
        alone = ctx.replace(mask=None, reset=None)
        read, memory = self.memory.read(part[:, :0], memory, alone)
        before, after = read.tokens, read.after
        if before is None or (after is None and ctx.causal):
            raise TypeError(
                f"{type(self.memory).__name__} reads no tokens for both ends of a segment, as `tokens` needs"
            )
        begins, ends = any(piece.first), any(piece.last)
        parts: list[tuple[Tensor, list[bool] | None]] = [(part, None)]
        if begins:
            parts.insert(0, (before.to(part.dtype), piece.first))
        if ends and after is not None:
            parts.append((after.to(part.dtype), piece.last))
        mask = None
        if piece.mask is not None or len({*piece.first}) > 1 or len({*piece.last}) > 1:
            real = part.new_ones(part.shape[:2], dtype=torch.bool) if piece.mask is None else piece.mask
            mask = torch.cat([real if rows is None else _shown(rows, tokens) for tokens, rows in parts], 1)
        whole = torch.cat([tokens for tokens, _ in parts], 1)
        start = before.shape[1] if begins else 0
        stop = start + part.shape[1]
        here = piece.ctx.replace(mask=mask, reset=None)

        def written(y: Tensor) -> tuple[Tensor, Context]:
            """What became of the tokens that the memory is told of, and where a segment has ended."""
            came = y[:, :start] if after is None else y[:, stop:]
            return came, alone.replace(mask=None if all(piece.last) else _shown(piece.last, came))

        def around(index: int, x: Tensor, layer: Callable[[Tensor], Output]) -> Output:
            nonlocal memory
            out = layer(self.memory.enter(index, x, memory, here))
            if ends:
                came, there = written(out.y)
                memory = self.memory.leave(index, came, memory, there)
            return out

        if isinstance(self.inner, Stack):
            out = self.inner.run(whole, here, inner, around)
        else:
            out = around(0, whole, partial(self.inner, ctx=here, state=inner))
        losses = scoped("inner", out.losses)
        if ends:
            came, there = written(out.y)
            memory, new_losses = self.memory.write(came, memory, there)
            losses |= scoped("memory", new_losses)
        return Output(out.y[:, start:stop], out.state, metrics=scoped("inner", out.metrics)), memory, losses

    def _refuse(self, ctx: Context, state: State | None) -> None:
        if state is not None and not ctx.causal:
            raise UnsupportedContext(
                "segments that look both ways need the whole sequence at once, so they cannot continue a state",
                hint="leave the state out, or use a causal context",
            )
        for name in ("positions", "grid", "graph", "cu_seqlens"):
            if getattr(ctx, name) is not None:
                raise UnsupportedContext(f"segments with a memory's tokens between them cannot honour ctx.{name}")
        if ctx.shared:
            raise UnsupportedContext(f"a memory's tokens have no {', '.join(ctx.shared)}, which ctx.shared holds")


def _shown(rows: list[bool], tokens: Tensor) -> Tensor:
    """(B, M) bool: tokens (B, M, D) of these rows."""
    return torch.tensor(rows, device=tokens.device)[:, None].expand(-1, tokens.shape[1])


def _rows(chosen: list[bool], new: State | None, old: State | None) -> State | None:
    """The new state in the rows chosen, the old one in the others."""
    if not any(chosen) or new is None or old is None:
        return old
    if all(chosen):
        return new
    device = next(iter(new.flat().values())).device
    return new.where(torch.tensor(chosen, device=device), old)
