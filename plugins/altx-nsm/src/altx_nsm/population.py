"""Which states live: those that few tokens choose die, one that many choose is split. Shapes never change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from altx_nsm.config import NSMConfig

SPREAD = 0.1
"""Noise on the copy when a state is split, as a part of each of its numbers."""


class Population(nn.Module):
    """S states, some of them dead.

    Buffers: alive (S,) bool; usage (S,) float32, the running mean of the part of the tokens that each state gets;
    born (S,) int64, how often a state came to life, so that what a sequence kept of a dead one is not taken for it.
    """

    alive: Tensor
    usage: Tensor
    born: Tensor

    def __init__(self, config: NSMConfig) -> None:
        super().__init__()
        self.config = config
        living = config.living or config.slots
        alive = torch.arange(config.slots) < living
        self.register_buffer("alive", alive)
        self.register_buffer("usage", alive.float() / living)
        self.register_buffer("born", torch.zeros(config.slots, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # In bfloat16 the running mean would soon be too coarse for its steps.
        self.usage = self.usage.to(torch.float32)
        return self

    @torch.no_grad()
    def update(self, load: Tensor, initial: Tensor, seed: int) -> None:
        """Follow the load, let states die, and split one. Never waits for the device.

        Args:
            load: (S,) tokens that each state got, all ranks together; nothing happens where it is 0 everywhere.
            initial: (S, any) the states before the first token; the row of a state that is born is written to.
            seed: of the noise; the same on every rank.
        """
        config, slots = self.config, torch.arange(len(self.alive), device=self.alive.device)
        load = load.to(self.usage)
        counted = load.sum() > 0
        share = load / load.sum().clamp(min=torch.finfo(load.dtype).tiny)
        usage = torch.where(counted, torch.lerp(share, self.usage, config.decay), self.usage)

        strongest = usage.masked_fill(~self.alive, -1).topk(config.k).indices
        kept = (usage >= config.prune / config.slots) | (slots[:, None] == strongest).any(1)
        alive = self.alive & (kept | ~counted)
        usage = usage * alive

        hot, dead = usage.argmax(), (~alive).to(torch.uint8).argmax()
        splits = (usage[hot] > config.split) & ~alive.all() & counted
        newborn, parent = (slots == dead) & splits, (slots == hot) & splits
        noise = torch.randn(initial.shape[1], generator=torch.Generator().manual_seed(seed)).to(initial)
        child = initial[hot] * (1 + SPREAD * noise)
        initial.copy_(torch.where(newborn[:, None], child, initial))
        self.usage.copy_(torch.where(newborn | parent, usage[hot] / 2, usage))
        self.alive.copy_(alive | newborn)
        self.born.add_(newborn)
