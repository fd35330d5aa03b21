"""The k keys with the largest products with each query, whatever order the keys come in.

B rows, T queries, H heads that ask, G heads of keys, n keys, k found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOWHERE = -1
"""Place of no key."""


@dataclass(frozen=True)
class Nearest:
    """The nearest keys so far.

    Args:
        score: (B, T, H, <= k), -inf where there is no key.
        place: (B, T, H, <= k) int64, where in the sequence the keys stand; NOWHERE for none.
    """

    score: Tensor
    place: Tensor

    @classmethod
    def none(cls, q: Tensor) -> Nearest:
        """Before any key was seen."""
        shape = *q.shape[:3], 0
        return cls(q.new_zeros(shape), torch.zeros(shape, dtype=torch.int64, device=q.device))

    def among(self, score: Tensor, place: Tensor, k: int) -> Nearest:
        """With more keys, of these scores and places (B, T, H, n); -inf for those that do not count."""
        score, place = torch.cat([self.score, score], -1), torch.cat([self.place, place], -1)
        if score.shape[-1] > k:
            score, best = score.topk(k, -1)
            place = place.gather(-1, best)
        return Nearest(score, place.masked_fill(score == -torch.inf, NOWHERE))


def best(q: Tensor, keys: Tensor, place: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and places (B, T, H, <= k) of the best of some keys.

    Args:
        q: (B, T, H, D).
        keys: (B, n, G, D).
        place: (B, n).
        counts: (B, T or 1, n) bool, what each query may find.
    """
    (_, length, heads, _), (_, count, groups, _) = q.shape, keys.shape
    asking = q.unflatten(2, (groups, -1)).transpose(1, 2)
    score = asking.flatten(2, 3) @ keys.to(q.dtype).permute(0, 2, 3, 1)
    score = score.unflatten(2, (length, -1))
    if not bool(counts.all()):
        score.masked_fill_(~counts[:, None, :, None], -torch.inf)
    score, at = score.topk(min(k, count), -1)
    place = place[:, None].expand(-1, length * heads, -1).gather(2, at.transpose(1, 2).flatten(1, 3))
    return score.transpose(1, 2).flatten(2, 3), place.unflatten(1, (length, heads))
