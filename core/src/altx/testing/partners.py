"""The plain mixer that memories and routers are checked with, so that a fault found is their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from altx.capabilities import Capabilities
from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.state import Leaf, State


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
