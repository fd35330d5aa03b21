"""What the memories have in common: a table of values of which few rows are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def table(rows: int, width: int) -> nn.EmbeddingBag:
    """Values (rows, width), each of length about 1."""
    values = nn.EmbeddingBag(rows, width, mode="sum", _weight=torch.empty(rows, width))
    nn.init.normal_(values.weight, std=width**-0.5)
    return values


def weighted_sum(values: nn.EmbeddingBag, chosen: Tensor, weights: Tensor) -> Tensor:
    """For each of M tokens the sum of the rows that its heads chose, in the dtype of the values.

    Only the rows that somebody chose are read, and no copy of them is made.

    Args:
        chosen: (H, M, k) int64 rows.
        weights: (H, M, k).

    Returns:
        (M, width).
    """
    bags, shares = (t.transpose(0, 1).flatten(1) for t in (chosen, weights))
    return F.embedding_bag(bags, values.weight, mode="sum", per_sample_weights=shares.to(values.weight.dtype))
