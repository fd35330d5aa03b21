"""Softmax attention over a sequence.

B rows, T queries, S slots (keys), H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output
from altx.masking import real_first
from altx.spec import BuildContext
from altx.state import State
from altx_attention.cache import GrowingCache, WindowCache
from altx_attention.config import AttentionConfig
from altx_attention.documents import places
from altx_attention.initial import as_in_gpt2
from altx_attention.kernels.softmax_attention import attention
from altx_attention.norm import RMSNorm
from altx_attention.rotary import angles, rotate


class Attention(Layer):
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
        super().__init__()
        self.head_dim = head_dim
        self.rotated = rotated
        self.rope_theta = rope_theta
        self.window = window
        self.scale = scale
        self.softcap = softcap
        self.gate = gate
        shape = kv_heads, head_dim
        self.cache = WindowCache(window, k=shape, v=shape) if window else GrowingCache(k=shape, v=shape)
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

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        weight = self.k_proj.weight
        return self.cache.empty(batch, capacity, device or weight.device, dtype or weight.dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if state is not None and not ctx.causal:
            raise UnsupportedContext(
                "attention that looks both ways needs the whole sequence at once, so it cannot continue a state",
                hint="leave the state out, or use a causal context",
            )
        if not x.shape[1]:
            return Output(x, state)
        tokens = real_first(x, ctx)
        where = places(tokens, ctx, state.seen if state else None, self.cache.document(state) if state else None)
        q, k, v, gate = self._projected(tokens.x, where.position)
        document = slot_document = where.document
        offset = None
        if state is not None:
            assert document is not None
            state, slots = self.cache.extend(state, {"k": k, "v": v}, document, tokens.mask, donated=ctx.donate_state)
            k, v = (slots.leaves[name].to(q.dtype) for name in ("k", "v"))
            slot_document, offset = slots.document, slots.offset
        elif tokens.mask is not None and not ctx.causal:
            document = where.index.expand(len(x), -1) * 0 if document is None else document
            slot_document = document.where(tokens.mask, -1)
        y = attention(
            q, k, v, causal=ctx.causal, window=self.window, offset=offset, document=document,
            slot_document=slot_document, scale=self.scale, softcap=self.softcap, sinks=self.sinks,
        ).flatten(2)  # fmt: skip
        if gate is not None:
            y = y * torch.sigmoid(gate)
        return Output(tokens.restore(self.o_proj(y)), state)

    def _projected(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q (B, T, H, D), k and v (B, T, G, D), and the gate (B, T, H * D)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        gate = None
        if self.gate:
            q, gate = (t.flatten(2) for t in q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1))
        if not self.norms_heads and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k))
        if self.norms_heads and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotated:
            turn = angles(position, self.rotated, self.rope_theta, x.dtype)
            q, k = rotate(q, turn), rotate(k, turn)
        return q, k, v, gate


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
