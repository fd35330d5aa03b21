"""Memory layers (Berges et al. 2024, arXiv:2412.09764, section 3).

Names and layout of the parameters are those of github.com/facebookresearch/memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.memory import Lookup
from altx.spec import BuildContext
from altx_product_key.config import MemoryLayerConfig, capabilities
from altx_product_key.lookup import table, weighted_sum
from altx_product_key.search import best_pairs


class Queries(nn.Module):
    """Queries of all heads: a linear map."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        linear = nn.Linear(dim, width)
        nn.init.xavier_uniform_(linear.weight)
        self.query_mlps = nn.Sequential(linear)

    def forward(self, x: Tensor) -> Tensor:
        queries: Tensor = self.query_mlps(x)
        return queries


class MemoryLayer(Lookup):
    """y = W (m * silu(V x)) with m the sum over heads of softmax(best k scores) values; section 3.4.

    Args:
        values: a table that another layer owns, to be read here; default: one of its own.
    """

    def __init__(self, config: MemoryLayerConfig, dim: int, values: nn.EmbeddingBag | None = None) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        halves, width, read = config.halves(dim), 2 * config.key_dim, config.value_dim or dim
        self.keys = nn.Parameter(torch.empty(2 * config.heads * halves, config.key_dim))
        nn.init.uniform_(self.keys, -(width**-0.5), width**-0.5)
        self.values = table(halves**2, read) if values is None else None
        # In a tuple, where torch does not look for parameters: they are the other layer's.
        self.shared: tuple[nn.EmbeddingBag, ...] = () if values is None else (values,)
        self.value_proj = _linear(read, dim, dim) if config.projection != "none" else None
        self.swilu_projection = _linear(dim, read, dim) if config.projection == "gated" else None
        self.gating = _linear(dim, 1, dim) if config.output_gate else None
        self.query_proj = Queries(dim, config.heads * width)

    @property
    def table(self) -> nn.EmbeddingBag:
        """The values that are read, whoever owns them."""
        return self.values or self.shared[0]

    def look_up(self, x: Tensor) -> Tensor:
        config, flat = self.config, x.flatten(0, 1)
        queries = self.query_proj(flat).unflatten(-1, (config.heads, 2, -1)).permute(2, 1, 0, 3)
        keys = self.keys.unflatten(0, (config.heads, 2, -1)).transpose(0, 1)
        scores, chosen = best_pairs(queries, keys, config.topk)
        # As the authors: weights are made in float32 at least, and have the dtype of the scores.
        precise = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=precise).to(scores.dtype)
        y = weighted_sum(self.table, chosen, weights)
        if self.swilu_projection is not None:
            y = y * F.silu(self.swilu_projection(flat))
        if self.value_proj is not None:
            y = self.value_proj(y)
        if self.gating is not None:
            y = y * torch.sigmoid(self.gating(flat))
        return y.to(x.dtype).view(x.shape)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        """As the authors' training: values have a rate of their own, and decay as other matrices do."""
        if self.values is None or self.config.value_lr is None:
            return {}
        return {"values.weight": {"lr": self.config.value_lr}}


def _linear(width: int, out: int, dim: int) -> nn.Linear:
    """A linear map whose weights start as the authors': normal, with variance 1 / dim whatever its own width."""
    linear = nn.Linear(width, out)
    nn.init.normal_(linear.weight, std=dim**-0.5)
    return linear


def build(config: MemoryLayerConfig, ctx: BuildContext) -> MemoryLayer:
    """A layer with values of its own, or with those of the first layer of the model that has as many of that width."""
    key = ("altx-product-key values", config.halves(ctx.dim), config.value_dim or ctx.dim)
    memory = MemoryLayer(config, ctx.dim, ctx.common.get(key) if config.share_values else None)
    if config.share_values:
        ctx.common[key] = memory.table
    return memory
