"""The best pairs of two lists, without looking at all of them (Lample et al. 2019, section 3.2)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def best_pairs(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k keys that fit best among the N^2 which two halves of N make, each pair's score the sum of its halves'.

    A pair of the best k has its halves among the best k of each half. More than that: a pair of the a-th and the b-th
    best is beaten by the ab - 1 pairs of better halves, so it is looked at only where ab <= k. The N^2 scores are never
    there.

    Args:
        queries: (2, H, M, d), both halves of M queries for each head.
        keys: (2, H, N, d).
        k: at most N.

    Returns:
        Scores (H, M, k), the best first, and numbers i N + j of the pairs (i, j).
    """
    best, where = (queries @ keys.transpose(-1, -2)).topk(k, -1)
    rows, columns = _staircase(k, queries.device)
    scores, chosen = (best[0][..., rows] + best[1][..., columns]).topk(k, -1)
    rows, columns = rows[chosen], columns[chosen]
    return scores, where[0].gather(-1, rows) * keys.shape[2] + where[1].gather(-1, columns)


def _staircase(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places a, b from 0 with (a + 1) (b + 1) <= k, row by row."""
    rows, columns = _places(k)
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


@functools.lru_cache
def _places(k: int) -> tuple[list[int], list[int]]:
    pairs = [(a, b) for a in range(k) for b in range(k // (a + 1))]
    return [a for a, _ in pairs], [b for _, b in pairs]
