"""Product-key memory (Lample et al. 2019, arXiv:1907.05242).

Names and layout of the parameters are those of the package product-key-memory, whose norm of queries this has, too: the
paper's batch norm would let tokens see each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from altx.memory import Lookup
from altx.spec import BuildContext
from altx_product_key.config import ProductKeyConfig, capabilities
from altx_product_key.lookup import table, weighted_sum
from altx_product_key.search import best_pairs


class ProductKey(Lookup):
    """y = sum over heads of softmax(best k scores) values; section 3.1."""

    def __init__(self, config: ProductKeyConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        halves, width = config.halves(dim), config.key_dim
        self.to_queries = nn.Linear(dim, 2 * config.heads * width, bias=False)
        self.norm = nn.LayerNorm(width) if config.query_norm == "layer" else nn.Identity()
        self.keys = nn.Parameter(torch.empty(config.heads, halves, 2, width))
        nn.init.normal_(self.keys, std=width**-0.5)
        self.values = table(halves**2, dim)

    def look_up(self, x: Tensor) -> Tensor:
        queries = self.norm(self.to_queries(x.flatten(0, 1)).unflatten(-1, (2, self.config.heads, -1)))
        scores, chosen = best_pairs(queries.permute(1, 2, 0, 3), self.keys.permute(2, 0, 1, 3), self.config.topk)
        weights = scores.softmax(-1) if self.config.weights == "softmax" else scores.relu()
        return weighted_sum(self.values, chosen, weights).to(x.dtype).view(x.shape)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        """As the paper's training: values have a rate of their own, and do not shrink while no token chooses them."""
        rate = {} if self.config.value_lr is None else {"lr": self.config.value_lr}
        return {"values.weight": {"weight_decay": 0.0, **rate}}


def build(config: ProductKeyConfig, ctx: BuildContext) -> ProductKey:
    return ProductKey(config, ctx.dim)
