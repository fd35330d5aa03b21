"""Modern Hopfield network over learned patterns (Ramsauer et al. 2020, arXiv:2008.02217).

Names and layout of the parameters are those of `HopfieldLayer` in github.com/ml-jku/hopfield-layers, without the
prefixes `hopfield.` and `association_core.`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.memory import Lookup
from altx.spec import BuildContext
from altx_hopfield.config import HopfieldConfig, capabilities


class Hopfield(Lookup):
    """N patterns that training stores, and of which each token retrieves.

        q = W_Q norm(x),  K = W_K norm(patterns),  V = W_V norm(patterns or values)
        q <- softmax(beta q K^T) K                     section 2, equation (3); all updates but the last
        y = W_O softmax(beta q K^T) V                  section 3, equation (10)

    Args:
        config: sizes, temperature, updates.
        dim: model width D.

    Shape: x (B, T, D) to a read value (B, T, D).
    """

    def __init__(self, config: HopfieldConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        inner = config.heads * config.width(dim)
        self.beta = config.width(dim) ** -0.5 if config.beta is None else config.beta
        self.lookup_weights = nn.Parameter(torch.empty(1, config.patterns, dim))
        self.target_weights = nn.Parameter(torch.empty(1, config.patterns, dim)) if config.separate_values else None
        self.norm_stored_pattern = nn.LayerNorm(dim)
        self.norm_state_pattern = nn.LayerNorm(dim)
        self.norm_pattern_projection = nn.LayerNorm(dim)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner)) if config.bias else None
        self.out_proj = nn.Linear(inner, dim, bias=config.bias)
        for weight in (self.lookup_weights, self.target_weights, self.in_proj_weight, self.out_proj.weight):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)
        if config.bias:
            nn.init.zeros_(self.out_proj.bias)

    def look_up(self, x: Tensor) -> Tensor:
        """What the tokens x (B, T, D) retrieve, (B, T, D)."""
        if not x.numel():
            return x
        patterns = self.lookup_weights[0]
        keys = self.norm_stored_pattern(patterns)
        values = self.norm_pattern_projection(patterns if self.target_weights is None else self.target_weights[0])
        q = self._project(self.norm_state_pattern(x.flatten(0, 1)), 0)
        heads = self._few(q, keys, values) if self._few_are(q.shape[1]) else self._many(q, keys, values)
        y: Tensor = self.out_proj(heads.transpose(0, 1).flatten(1))
        return y.to(x.dtype).view(x.shape)

    def _many(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What queries q (H, M, d) read of patterns and values (N, D), (H, M, d): all of these are projected."""
        q, k, v = q[None], self._project(keys, 1)[None], self._project(values, 2)[None]
        for _ in range(self.config.updates - 1):
            q = F.scaled_dot_product_attention(q, k, k, scale=self.beta)
        return F.scaled_dot_product_attention(q, k, v, scale=self.beta)[0]

    def _few(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same: instead of every pattern, each query is projected, and so is the mean of patterns that it reads.

        A bias of keys adds the same to all scores of a query, so it is only in what is read.
        """
        rows = self.in_proj_weight.chunk(3)[1].unflatten(0, (self.config.heads, -1))
        for left in reversed(range(self.config.updates)):
            shares = torch.softmax(self.beta * (q @ rows) @ keys.mT, -1)
            q = self._project(shares @ keys, 1) if left else self._project(shares @ values, 2)
        return q

    def _few_are(self, tokens: int) -> bool:
        """Whether it is less work to project these tokens' queries than the patterns."""
        config, (inner, dim) = self.config, self.out_proj.weight.T.shape
        many = 2 * config.patterns * inner * dim + 2 * tokens * config.updates * config.patterns * inner
        return 2 * tokens * config.updates * dim * (inner + config.heads * config.patterns) < many

    def _project(self, rows: Tensor, part: int) -> Tensor:
        """Rows (M, D), or those of each head (H, M, D), as queries (part 0), keys (1) or values (2): (H, M, d)."""
        weight = self.in_proj_weight.chunk(3)[part]
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[part]
        if rows.dim() == 2:
            heads: Tensor = F.linear(rows, weight, bias).unflatten(-1, (self.config.heads, -1))
            return heads.transpose(0, 1)
        projected: Tensor = rows @ weight.unflatten(0, (self.config.heads, -1)).mT
        return projected if bias is None else projected + bias.unflatten(0, (self.config.heads, 1, -1))


def build(config: HopfieldConfig, ctx: BuildContext) -> Hopfield:
    return Hopfield(config, ctx.dim)
