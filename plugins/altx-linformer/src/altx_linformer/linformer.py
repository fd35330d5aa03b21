"""Linformer: attention to k mixtures of the tokens (Wang et al. 2020, arXiv:2006.04768).

B rows, T tokens, H query heads, G key and value heads (H or 1), D width of a head, K mixtures.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output
from altx.masking import by_document, real_first
from altx.spec import BuildContext
from altx.state import State
from altx_linformer.config import LinformerConfig


class Linformer(Layer):
    """Equation 7, with E and F transposed: softmax(Q (E^T K)^T / sqrt(D)) F^T V in each head.

    Parameters have the names, shapes and initial distributions of `LinformerSelfAttention` in the package linformer;
    E and F are `proj_k` and `proj_v`, (max_len, K), or (H, max_len, K) where each head has its own.

    A token's place is its index among the real tokens of its row, or of its document where there are resets.

    Args:
        dim: model width.
        max_len: longest row.
        k: K.
        heads: H.
        head_dim: D.
        sharing: "none", "headwise" or "key-value", section 4 of the paper.
        one_kv_head: whether G is 1.
        share_kv: whether values are the keys.
    """

    def __init__(
        self,
        dim: int,
        *,
        max_len: int,
        k: int,
        heads: int,
        head_dim: int,
        sharing: str = "headwise",
        one_kv_head: bool = False,
        share_kv: bool = False,
    ) -> None:
        super().__init__()
        self.max_len, self.k, self.head_dim = max_len, k, head_dim
        inner = head_dim * (1 if one_kv_head else heads)
        shape = (heads, max_len, k) if sharing == "none" else (max_len, k)
        self.to_q = nn.Linear(dim, head_dim * heads, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = None if share_kv else nn.Linear(dim, inner, bias=False)
        self.proj_k = nn.Parameter(torch.empty(shape).uniform_(-(k**-0.5), k**-0.5))
        self.proj_v = None
        if sharing != "key-value" and not share_kv:
            self.proj_v = nn.Parameter(torch.empty(shape).uniform_(-(k**-0.5), k**-0.5))
        self.to_out = nn.Linear(head_dim * heads, dim)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.causal or state is not None:
            raise UnsupportedContext(
                "linformer mixes keys and values over the whole sequence, so a token sees later ones, and nothing can "
                "be continued",
                hint="use it in an encoder: causal: false, and no state",
            )
        length = x.shape[1]
        if not length:
            return Output(x)
        if ctx.reset is not None:
            rows = by_document(x, ctx)
            return Output(rows.restore(self(rows.x, Context(causal=False, mask=rows.mask)).y))
        if length > self.max_len:
            raise UnsupportedContext(
                f"{length} tokens are more than the {self.max_len} that this linformer has places for",
                hint=f"cut the sequence to {self.max_len} tokens, or set linformer.max_len to {length} and train anew",
            )
        # Masked tokens come last and are 0, and so are their keys and values, which have no biases.
        batch = real_first(x, ctx)
        k_BGKD = self._mixed(batch.x, self.to_k, self.proj_k)
        if self.to_v is None:
            v_BGKD = k_BGKD
        else:
            v_BGKD = self._mixed(batch.x, self.to_v, self.proj_k if self.proj_v is None else self.proj_v)
        q_BHTD = self._by_head(self.to_q(batch.x))
        heads = q_BHTD.shape[1]
        y = F.scaled_dot_product_attention(q_BHTD, k_BGKD.expand(-1, heads, -1, -1), v_BGKD.expand(-1, heads, -1, -1))
        return Output(batch.restore(self.to_out(y.transpose(1, 2).flatten(2))))

    def _mixed(self, x: Tensor, project: nn.Linear, weights: Tensor) -> Tensor:
        """Keys or values (B, G, K, D): mixtures of the tokens x (B, T, dim), projected."""
        mix = weights[..., : x.shape[1], :].mT
        if mix.dim() == 3:
            return mix @ self._by_head(project(x))
        # Whichever leaves fewer rows for the second product comes first.
        return self._by_head(project(mix @ x) if self.k < x.shape[1] else mix @ project(x))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, T, G D) to (B, G, T, D)."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads


def build(config: LinformerConfig, ctx: BuildContext) -> Linformer:
    return Linformer(
        ctx.dim,
        max_len=config.max_len,
        k=config.k,
        heads=config.heads,
        head_dim=config.width(ctx.dim),
        sharing=config.sharing,
        one_kv_head=config.one_kv_head,
        share_kv=config.share_kv,
    )
