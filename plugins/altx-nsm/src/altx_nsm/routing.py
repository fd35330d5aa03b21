"""Which states each token reads and writes, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from altx.context import Context
from altx.router import Router, Targets

ENOUGH = 1e-6
"""Tokens' worth of writes in a chunk from which a state counts as touched."""
SHARPNESS = 8.0
"""Initial factor of the cosines that a token chooses by."""


class Choice(NamedTuple):
    """How tokens share themselves out among S states.

    Args:
        share: (B, T, S), 0 for a state that was not chosen. Carries the gradient.
        scores: (B, T, S) that were chosen by, the lowest number there is for what is dead; None by another router.
        losses: of another router.
        load: (S,) what another router counts as its load, or None.
    """

    share: Tensor
    scores: Tensor | None
    losses: Mapping[str, Tensor]
    load: Tensor | None


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along x; shorter where x is next to nothing, so that its gradient stays bounded."""
    short: Tensor = F.rms_norm(x, x.shape[-1:], eps=1e-6) * x.shape[-1] ** -0.5
    return short


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k highest scores, and the softmax of these; both (B, T, k).

    Args:
        scores: (B, T, S), the lowest number there is for what is dead: beside one that lives, its softmax is 0.
    """
    top = scores.topk(k, -1)
    return top.indices, torch.softmax(top.values, -1)


def by_content(q: Tensor, keys: Tensor, alive: Tensor, k: int) -> Choice:
    """The k living states that a token's query matches best, weighted by the softmax of these k scores.

    Args:
        q: (B, T, W), already scaled.
        keys: (B, S, W).
        alive: (S,) bool. Where none is, the shares mean nothing.
        k: states per token.
    """
    scores = (q @ keys.transpose(-1, -2)).masked_fill(~alive, torch.finfo(q.dtype).min)
    return Choice(torch.zeros_like(scores).scatter(-1, *best(scores, k)), scores, {}, None)


def by_router(router: Router, x: Tensor, states: Tensor, alive: Tensor, mask: Tensor | None) -> Choice:
    """What any other router says of tokens x (B, T, D) and states (B, S, W)."""
    batch, length = x.shape[:2]
    targets = Targets(len(alive), "states", states, alive)
    route = router.route(x, targets, Context(mask=mask))
    share = route.dense(batch, length).permute(1, 2, 0).to(states.dtype)
    return Choice(share, None, route.losses, route.metrics.get("load"))
