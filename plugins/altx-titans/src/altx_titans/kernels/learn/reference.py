"""Chunks learned and read one after another, a chunk's tokens together: what Titans and TTT have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.trees import leaves, map_leaves
from altx_titans.fast import Mix, Network, Norm, Weights, moved


class Chunks(NamedTuple):
    """N chunks of C tokens, and of what the weights at each are made; see `altx_titans.fast`.

    Args:
        key: (B, H, N, C, d).
        value: (B, H, N, C, d).
        query: (B, H, N, C, d), or None where nothing reads.
        keep: (B, H, N, C), of the weights that token t reads: the part that is left of those before the chunk.
        drift: (B, H, N, C), what their momentum has added; None where no momentum moves them.
        share: (B, H, N, C, C), the part of token i's gradient in those at token t.
        last_keep: (B, H, N), the same for the weights after the chunk.
        last_drift: (B, H, N), or None.
        last_share: (B, H, N, C).
        moving_keep: (B, H, N), the same for the momentum after the chunk; None where there is none.
        moving_share: (B, H, N, C), or None.
        full: (B, N) bool, chunks that end here: the next gradients are those at the weights after it.
        anew: (B, N) bool, chunks before which everything starts afresh, or None.
    """

    key: Tensor
    value: Tensor
    query: Tensor | None
    keep: Tensor
    drift: Tensor | None
    share: Tensor
    last_keep: Tensor
    last_drift: Tensor | None
    last_share: Tensor
    moving_keep: Tensor | None
    moving_share: Tensor | None
    full: Tensor
    anew: Tensor | None

    def mixes(self) -> Iterator[tuple[Mix, Mix, Mix | None]]:
        """Of what each chunk's tokens read, of the weights after it, and of the momentum after it."""
        read = zip(*map(self._apart, (self.keep, self.drift), (1, 1)), self.share.unbind(2), strict=True)
        last = zip(*map(self._apart, (self.last_keep, self.last_drift, self.last_share), (2, 2, -1)), strict=True)
        moving = zip(*map(self._apart, (self.moving_keep, self.moving_share), (2, -1)), strict=True)
        for one, two, (keep, share) in zip(read, last, moving, strict=True):
            yield Mix(*one), Mix(*two), None if keep is None else Mix(keep, None, share)

    def _apart(self, x: Tensor | None, wide: int) -> Sequence[Tensor | None]:
        """Chunk by chunk, to multiply (B, H, C, d) with: so many dimensions more at the end, or one before the last."""
        if x is None:
            return [None] * self.key.shape[2]
        for _ in range(abs(wide)):
            x = x.unsqueeze(-1 if wide > 0 else -2)
        return x.unbind(2)


class Learned(NamedTuple):
    """What `learn` returns.

    Args:
        value: (B, H, N, C, d) that the queries read, or None.
        weights: after the last chunk, by name.
        start: at which the gradients of the chunk that is open after it are taken.
        moving: the momentum.
    """

    value: Tensor | None
    weights: dict[str, Tensor]
    start: dict[str, Tensor]
    moving: dict[str, Tensor]


def learn(
    network: Network, chunks: Chunks, weights: Weights, start: Weights, moving: Weights, fresh: Weights, norm: Norm
) -> Learned:
    """Read and write chunk by chunk.

    Args:
        network: its form.
        chunks: tokens, and coefficients.
        weights: before the first chunk, by name; see `altx_titans.fast`.
        start: at which the first chunk's gradients are taken.
        moving: the momentum, empty where there is none.
        fresh: what `weights` and `start` are where a chunk starts afresh; its momentum is then zero.
        norm: what stands around the network.
    """
    given: tuple[Any, ...] = (chunks, dict(weights), dict(start), dict(moving), dict(fresh), norm)
    dtype = precise(*leaves(given).values())
    given = map_leaves(lambda _, x: x.to(dtype) if x.is_floating_point() else x, given)
    learned: Learned = map_leaves(lambda _, x: x.to(chunks.value.dtype), _learn(network, *given))
    return learned


def _learn(
    network: Network,
    chunks: Chunks,
    weights: dict[str, Tensor],
    start: dict[str, Tensor],
    moving: dict[str, Tensor],
    fresh: dict[str, Tensor],
    norm: Norm,
) -> Learned:
    """Of tensors in one dtype."""
    found = []
    keys, values = chunks.key.unbind(2), chunks.value.unbind(2)
    queries = () if chunks.query is None else chunks.query.unbind(2)
    for n, (reading, last, lasting) in enumerate(chunks.mixes()):
        if chunks.anew is not None:
            anew = chunks.anew[:, n, None, None, None]
            weights = {name: torch.where(anew, fresh[name], w) for name, w in weights.items()}
            start = {name: torch.where(anew, fresh[name], w) for name, w in start.items()}
            moving = {name: s.masked_fill(anew, 0) for name, s in moving.items()}
        tape = network.gradients(start, keys[n], values[n], norm)
        if queries:
            found.append(network.read(weights, moving, queries[n], norm, tape, reading))
        weights, moving = (
            moved(weights, moving, tape, last),
            moving if lasting is None else moved(moving, {}, tape, lasting),
        )
        full = chunks.full[:, n, None, None, None]
        start = {name: torch.where(full, weights[name], w) for name, w in start.items()}
    return Learned(torch.stack(found, 2) if found else None, weights, start, moving)
