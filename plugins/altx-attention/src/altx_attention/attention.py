"""Softmax attention over a sequence.

B rows, T queries, S slots (keys), H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from altx.context import Cross
from altx.memory import Attended, attended
from altx.spec import BuildContext, Heads
from altx_attention.cache import GrowingCache, WindowCache
from altx_attention.cached import CachedAttention, Places, Recall
from altx_attention.config import AttentionConfig
from altx_attention.initial import as_in_gpt2
from altx_attention.joined import joined
from altx_attention.kernels.rotary import rotary
from altx_attention.kernels.softmax_attention import attention
from altx_attention.norm import RMSNorm
from altx_attention.rotary import turns


class Attention(CachedAttention):
    """Multi-head attention (Vaswani et al. 2017, section 3.2), with what later models added to it.

    Args:
        dim: model width.
        heads: H.
        kv_heads: G (Ainslie et al. 2023); it divides H.
        head_dim: D.
        rotated: how many features of a head are turned by the token's position; 0 for no positions.
        rope_theta: base of the rotary wavelengths (Su et al. 2021).
        window: a token sees itself and the window - 1 real tokens before it, and without `ctx.causal` as many
            after it; None for all.
        scale: of the scores; None for D ** -0.5.
        softcap: bound of the scores (Gemma Team 2024, arXiv:2408.00118, section 2); None for none.
        sinks: whether each head learns a score that takes part in its softmax (OpenAI 2025, arXiv:2508.10925,
            section 2.2).
        qk_norm: "head": RMS norm of each head's queries and keys (Qwen3, arXiv:2505.09388); "width": of all heads' at
            once (OLMo 2, arXiv:2501.00656); "none".
        norm_eps: of that norm.
        gate: whether the heads' outputs are gated by sigmoid of a projection of x, which is the second half of each
            head's rows of q_proj (Qwen3-Next; Qiu et al. 2025, arXiv:2505.06708).
        bias: whether the projections have biases.
        num_layers: number of blocks in the model.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotated: int,
        rope_theta: float = 10000.0,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: Literal["none", "head", "width"] = "none",
        norm_eps: float = 1e-6,
        gate: bool = False,
        bias: bool = False,
        num_layers: int = 1,
    ) -> None:
        shape = kv_heads, head_dim
        super().__init__(WindowCache(window, k=shape, v=shape) if window else GrowingCache(k=shape, v=shape))
        self.head_dim = head_dim
        self.rotated = rotated
        self.rope_theta = rope_theta
        self.window = window
        self.scale = scale
        self.scale_of_scores = head_dim**-0.5 if scale is None else scale
        self.hands = Heads(query=heads, kv=kv_heads, key_dim=head_dim, value_dim=head_dim)
        self.softcap = softcap
        self.gate = gate
        self.q_proj = nn.Linear(dim, heads * head_dim * (2 if gate else 1), bias=bias)
        # What a bias of the keys alone adds to the scores of a query is the same for all slots, and softmax cancels it.
        felt = bool(rotated) or softcap is not None or sinks or qk_norm != "none"
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias and felt)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=bias)
        self.sinks = nn.Parameter(torch.empty(heads)) if sinks else None
        as_in_gpt2(self, num_layers)
        self.norms_heads = qk_norm == "head"
        if qk_norm != "none":
            self.q_norm: RMSNorm | None = RMSNorm(head_dim if self.norms_heads else heads * head_dim, norm_eps)
            self.k_norm: RMSNorm | None = RMSNorm(head_dim if self.norms_heads else kv_heads * head_dim, norm_eps)
        else:
            self.q_norm = self.k_norm = None

    def project(
        self,
        x: Tensor,
        position: Tensor,
        recall: Recall | None = None,
        cross: Cross | None = None,
        leaves: bool = True,
    ) -> tuple[list[Tensor], dict[str, Tensor], Attended | None]:
        """Queries (B, T, H, D) and the gate (B, T, H * D) if there is one; keys and values (B, T, G, D)."""
        q, gate, kv = self.q_proj(x), [], self._keys_and_values(x) if leaves or recall else None
        if self.gate:
            q, *gate = (t.flatten(2) for t in q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1))
        q = self._heads(q, self.q_norm)
        # What is not of this sequence has no position in it: it is found by content (Wu et al. 2022, section 3.1).
        far = recall(q * self.scale_of_scores, *kv) if recall and kv else None
        if cross is not None:
            far = attended(q * self.scale_of_scores, *self._keys_and_values(cross.tokens), cross.mask)
        if self.rotated:
            turn = turns(position, self.rotated, self.rope_theta, x.dtype)
            q, kv = rotary(q, *turn), kv and (rotary(kv[0], *turn), kv[1])
        return [q, *gate], dict(zip(("k", "v"), kv or (), strict=False)), far

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens x (..., dim), without positions: (..., G, D)."""
        return self._heads(self.k_proj(x), self.k_norm), self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """Queries or keys (..., heads * D), normed if they are, as (..., heads, D)."""
        whole = norm(x) if norm and not self.norms_heads else x
        heads: Tensor = whole.unflatten(-1, (-1, self.head_dim))
        return norm(heads) if norm and self.norms_heads else heads

    def attend(self, queries: list[Tensor], slots: Mapping[str, Tensor], where: Places, far: Attended | None) -> Tensor:
        q = queries[0]

        def near(v: Tensor, sinks: Tensor | None) -> Tensor:
            return attention(
                q, slots["k"], v, window=self.window, scale=self.scale, softcap=self.softcap, sinks=sinks, **where
            )

        return (near(slots["v"], self.sinks) if far is None else joined(near, slots["v"], self.sinks, far)).flatten(2)

    def output(self, y: Tensor, queries: list[Tensor]) -> Tensor:
        return self.o_proj(y * torch.sigmoid(queries[1]) if self.gate else y)  # type: ignore[no-any-return]


def build(config: AttentionConfig, ctx: BuildContext) -> Attention:
    return Attention(
        ctx.dim,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_dim=config.width(ctx.dim),
        rotated=config.rotated(ctx.dim),
        rope_theta=config.rope_theta,
        window=config.window,
        scale=config.scale,
        softcap=config.softcap,
        sinks=config.sinks,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        gate=config.gate,
        bias=config.bias,
        num_layers=ctx.num_layers,
    )
