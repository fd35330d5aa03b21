"""Attention within a window as one over many short sequences, so that its cost grows with T and not with T * S.

Queries are cut into n blocks of C. Block i sees the C slots that it stands at, and as many before (and after, without
`causal`) as the window reaches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from altx_attention.kernels.softmax_attention.visibility import Place


def block_size(window: int) -> int:
    """C: a quarter of the window, so that a query looks at five slots for every four that it sees, and keys are copied
    five times; and products of some size."""
    return max(64, window // 4)


def folds(q: Tensor, k: Tensor, place: Place) -> bool:
    """Whether it pays: queries stand at the last slots, and most slots are out of reach of most of them."""
    if place.window is None or place.offset is not None or not q.shape[0]:
        return False
    return q.shape[1] >= 2 * block_size(place.window) and q.shape[1] + k.shape[1] > 4 * place.window


def folded(
    q: Tensor, k: Tensor, v: Tensor, place: Place, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Place, Tensor | None, tuple[int, int]]:
    """q (B, T, ...), k and v (B, S, ...) and sinks as B * n sequences of C queries; and B and T."""
    assert place.window is not None
    batch, count = q.shape[:2]
    slots, size, reach = k.shape[1], block_size(place.window), place.window - 1
    blocks = -(-count // size)
    width = size + reach * (1 if place.causal else 2)
    # The first slot that block 0 looks at, and the first that the last block does not. There is nothing before slot 0.
    first = slots - count - reach
    last = first + (blocks - 1) * size + width
    document, slot_document = place.document, place.slot_document
    if document is None or slot_document is None:
        document, slot_document = (torch.zeros(batch, n, dtype=torch.int8, device=q.device) for n in (count, slots))

    def cut(x: Tensor, value: float = 0) -> Tensor:
        """(B, S, ...) to (B * n, width, ...)."""
        inside = x[:, max(first, 0) : min(last, slots)]
        spread = F.pad(inside, [0, 0] * (x.dim() - 2) + [max(-first, 0), max(last - slots, 0)], value=value)
        pieces: Tensor = spread.unfold(1, width, size).movedim(-1, 2)
        return pieces.flatten(0, 1)

    def split(x: Tensor, value: float = 0) -> Tensor:
        """(B, T, ...) to (B * n, C, ...)."""
        spread = F.pad(x, [0, 0] * (x.dim() - 2) + [0, blocks * size - count], value=value)
        return spread.reshape(batch * blocks, size, *x.shape[2:])

    offset = torch.full((batch * blocks,), reach, device=q.device)
    inner = Place(place.causal, place.window, offset, split(document, -2), cut(slot_document, -1))
    sinks = sinks if sinks is None or sinks.dim() == 1 else split(sinks)
    return split(q), cut(k), cut(v), inner, sinks, (batch, count)


def unfolded(y: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B * n, C, ...) as (B, T, ...)."""
    batch, count = shape
    return y.reshape(batch, -1, *y.shape[2:])[:, :count]
