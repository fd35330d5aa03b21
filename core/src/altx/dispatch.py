"""The dispatch plan: which rows of which target a batch of tokens becomes, in one sorted list, or side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altx.context import Context


@dataclass(frozen=True)
class Plan:
    """P (token, target) pairs sorted by (target, row, time); pairs without a target come last.

    P does not depend on the data, so that nothing synchronises with the host.

    Args:
        token: (P,) int64 index b*T + t.
        weight: (P,) gate of each pair, 0 where there is no target; carries the router's gradient.
        offsets: (n+1,) int64: target i owns pairs offsets[i]:offsets[i+1]. Pairs from offsets[n] on are void.
        full: known to have no void pairs.
    """

    token: Tensor
    weight: Tensor
    offsets: Tensor
    full: bool = False

    def cut(self) -> Plan:
        """Without void pairs where that asks no device for their number; else the plan as it is."""
        if not self.offsets.is_cpu or torch.compiler.is_compiling():
            return self
        total = int(self.offsets[-1])
        return Plan(self.token[:total], self.weight[:total], self.offsets, full=True)

    def gather(self, x: Tensor) -> Tensor:
        """Rows of x (B, T, D) in the plan's order: (P, D), 0 in void pairs."""
        rows = x.reshape(-1, x.shape[-1]).index_select(0, self.token)
        return rows if self.full else rows.masked_fill(~self.valid[:, None], 0)

    def combine(self, y: Tensor, batch: int, length: int) -> Tensor:
        """Weighted sum of the targets' outputs y (P, D) per token: (B, T, D)."""
        # A void pair's row was computed by nobody, so its content may be anything, NaN included.
        y = y if self.full else y.masked_fill(~self.valid[:, None], 0)
        weighted = y * self.weight[:, None].to(y.dtype)
        flat = y.new_zeros(batch * length, y.shape[-1]).index_add(0, self.token, weighted)
        return flat.reshape(batch, length, y.shape[-1])

    @property
    def valid(self) -> Tensor:
        """(P,) bool: pairs that have a target."""
        return torch.arange(len(self.token), device=self.token.device) < self.offsets[-1]


@dataclass(frozen=True)
class Rows:
    """Where one target's tokens stand when each row's are laid side by side, as (B, L) with padding at the end.

    Args:
        token: (C,) int64 b*T + t, in order.
        place: (C,) int64 b*L + l; None if it is 0, 1, 2, ...: no row has padding.
        source: (B*L,) int64 b*T + t of what stands there, padding repeats a token; empty if there is none.
        mask: (B, L) bool, False for padding; None if there is none.
    """

    token: Tensor
    place: Tensor | None
    source: Tensor
    mask: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, token: Tensor, counts: Tensor, host: list[int], length: int) -> Rows:
        """From the number of tokens of each row, on the device (B,) and here. length: T."""
        shape = (len(host), max([*host, 1]))  # No layer is asked to do nothing.
        if min(host) == shape[1]:
            return cls(token, None, token, None, shape)
        step = torch.arange(shape[1], device=token.device)
        start = counts.cumsum(0) - counts
        row = token // length
        place = row * shape[1] + torch.arange(len(token), device=token.device) - start[row]
        source = token[(start[:, None] + step).clamp(max=len(token) - 1).flatten()] if len(token) else token
        return cls(token, place, source, step < counts[:, None], shape)

    def lay(self, values: Tensor) -> Tensor:
        """Values (B*T, ...) as (B, L, ...)."""
        return self.shaped(values.index_select(0, self.source))

    def shaped(self, values: Tensor) -> Tensor:
        """Values at `source` as (B, L, ...); 0 if there are none."""
        shape = (*self.shape, *values.shape[1:])
        return values.view(shape) if len(self.source) else values.new_zeros(shape)

    def pick(self, values: Tensor) -> Tensor:
        """(B, L, ...) as (C, ...)."""
        flat = values.flatten(0, 1)
        return flat if self.place is None else flat.index_select(0, self.place)

    def context(self, ctx: Context) -> Context:
        """The context of (B, T) for (B, L)."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else self.lay(value.flatten(0, 1))

        kv = ctx.shared_kv
        return ctx.replace(
            mask=self.mask,
            positions=move(ctx.positions),
            reset=move(ctx.reset),
            shared={name: self.lay(value.flatten(0, 1)) for name, value in ctx.shared.items()},
            shared_kv=None if kv is None else replace(kv, own=move(kv.own)),
        )


def lay(values: Tensor, rows: list[Rows]) -> list[Tensor]:
    """Values (B*T, ...) of every target's tokens side by side, (B, L, ...) each, in one gather."""
    sources = [each.source for each in rows]
    parts = values.index_select(0, torch.cat(sources)).split([len(source) for source in sources])
    return [each.shaped(part) for each, part in zip(rows, parts, strict=True)]


def countable(x: Tensor, ctx: Context) -> bool:
    """Whether targets can be given the tokens of their own only: not in a graph that is traced, which cannot ask for
    their number, nor where packed sequences, edges or a grid say where tokens are."""
    placed = ctx.cu_seqlens is not None or ctx.graph is not None or ctx.grid is not None
    return x.shape[0] > 0 and x.shape[1] > 1 and not (placed or x.is_meta or torch.compiler.is_compiling())


def resets(ctx: Context, chosen: Tensor, pending: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where each target starts afresh: at its first token since a reset that it may not have seen itself.

    Args:
        chosen: (n, B, T) bool.
        pending: (B, n) bool, targets that have not had a token since the last reset; None for a fresh sequence.

    Returns:
        resets (n, B, T), or None if there are none, and the new pending.
    """
    if ctx.reset is None and pending is None:
        return None, None
    n, batch, length = chosen.shape
    reset = torch.zeros(batch, length, dtype=torch.bool, device=chosen.device) if ctx.reset is None else ctx.reset
    if ctx.mask is not None:
        reset = reset & ctx.mask
    owed = chosen.new_zeros(n, batch, 1) if pending is None else pending.T[..., None]
    # Resets so far, against how many of them the target had seen at its last token before this one.
    so_far = reset.cumsum(1) + owed.long()
    known = torch.cat([so_far.new_zeros(n, batch, 1), torch.where(chosen, so_far, 0)], -1).cummax(-1).values
    total = so_far[..., -1] if length else owed[..., 0].long()
    return chosen & (so_far > known[..., :-1]), (total > known[..., -1]).T


def plan(token: Tensor, target: Tensor, weight: Tensor, num_targets: int) -> Plan:
    """Sort pairs by target, and within a target by token, which is by row and time.

    Args:
        token: (P,) int64 b*T + t.
        target: (P,) int64, -1 for none.
        weight: (P,).
        num_targets: n.
    """
    key = torch.where(target < 0, num_targets, target)
    by_token = torch.argsort(token, stable=True)
    order = by_token[torch.argsort(key[by_token], stable=True)]
    counts = torch.zeros(num_targets + 1, dtype=torch.int64, device=token.device)
    counts = counts.index_add(0, key, torch.ones_like(key))
    offsets = torch.cat([counts.new_zeros(1), counts[:num_targets].cumsum(0)])
    return Plan(token[order], weight[order], offsets)
