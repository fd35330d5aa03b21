"""Around code that was not written for altx: it is given plain sequences, and knows neither masks nor resets."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.layout import compaction, take
from altx.state import State


class Wrapped(Layer):
    """A layer that honours masks and resets although `run`, which is all that it does, knows of neither.

    Sequences of one length run together, each by itself: right for any code, causal or not, and as many calls as there
    are different lengths. Without a mask and without resets it is one call; with them it looks at their values, which
    synchronises with the device and does not compile.
    """

    @abstractmethod
    def run(self, x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        """What the layer makes of plain sequences, and the state after them.

        Args:
            x: (N, T, D), every token real, each row one sequence or the next part of one; T > 0.
            ctx: without a mask and without resets.
            state: of these N rows, from `init_state` or an earlier call; an empty one for a layer that has none.
                `seen` is counted on around this call.
        """

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        start = self._fresh(len(x), x) if state is None else state
        if ctx.mask is None and ctx.reset is None and x.shape[1]:
            y, after = self.run(x, ctx, start)
        else:
            y, after = self._each(x, ctx, start)
        if state is None:
            return Output(y)
        return Output(y, after.replace(seen=None if start.seen is None else advanced(start.seen, x, ctx)))

    def _fresh(self, batch: int, x: Tensor) -> State:
        state = self.init_state(batch, device=x.device, dtype=x.dtype)
        return State() if state is None else state

    def _each(self, x: Tensor, ctx: Context, start: State) -> tuple[Tensor, State]:
        """Run each sequence by itself, those of one length together. Looks at the values of masks and resets."""
        batch, length = x.shape[:2]
        real = x.new_ones(batch, length, dtype=torch.bool) if ctx.mask is None else ctx.mask
        order, _ = compaction(real)
        first = torch.zeros_like(real) if ctx.reset is None else take(ctx.reset & real, order)
        counts = real.sum(1).tolist()
        starts: list[list[int]] = [[] for _ in range(batch)]
        for row, place in first.nonzero().tolist():
            starts[row].append(place)
        together: dict[tuple[int, bool], list[tuple[int, int]]] = defaultdict(list)
        for row, count in enumerate(counts):
            bounds = sorted({0, *starts[row], count})
            for begin, end in pairwise(bounds):
                together[end - begin, begin in starts[row]].append((row, begin))
        idle = [row for row, count in enumerate(counts) if not count]
        ended, states = list(idle), [start.select(torch.tensor(idle, dtype=torch.int64, device=x.device))]
        y = torch.zeros_like(x)
        for (size, fresh), spans in together.items():
            rows, begin = torch.tensor(spans, device=x.device).T
            at = (rows[:, None], order[rows[:, None], begin[:, None] + torch.arange(size, device=x.device)])
            here = ctx.replace(
                mask=None,
                reset=None,
                positions=None if ctx.positions is None else ctx.positions[at],
                shared={name: value[at] for name, value in ctx.shared.items()},
            )
            found, after = self.run(x[at], here, self._fresh(len(spans), x) if fresh else start.select(rows))
            y = y.index_put(at, found)
            last = [index for index, (row, begin) in enumerate(spans) if begin + size == counts[row]]
            ended += [spans[index][0] for index in last]
            states.append(after.select(torch.tensor(last, dtype=torch.int64, device=x.device)))
        return y, State.cat(states).select(torch.tensor(ended, device=x.device).argsort())
