"""Multi-head latent attention.

B rows, T queries, S slots, H heads, R width of a latent, N, P and V widths of a head's unrotated key, of the rotated
key and of a head's value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from altx.context import Cross
from altx.memory import Attended
from altx.spec import BuildContext
from altx_attention.cache import GrowingCache
from altx_attention.cached import CachedAttention, Places, Recall
from altx_attention.kernels.rotary import rotary
from altx_attention.kernels.softmax_attention import attention
from altx_attention.mla_config import LatentAttentionConfig
from altx_attention.norm import RMSNorm
from altx_attention.rotary import turns


class LatentAttention(CachedAttention):
    """Attention whose keys and values come from one small latent per token (DeepSeek-AI 2024, arXiv:2405.04434, 2.1).

        c_t = norm(W_DKV x_t),    k_t = [W_UK c_t, rotated(W_KR x_t)],    v_t = W_UV c_t
        q_t = [W_UQ x_t, rotated(W_QR x_t)]

    The state holds c_t and the rotated key, which all heads share. A few queries meet them as they are: W_UK moves
    into the query and W_UV behind the mean of latents (section 2.1.2), so that nothing per head is made of a slot.

    Weights have the names of DeepSeek-V3 and start as there (arXiv:2412.19437, section 4.2): normal with std 0.006.

    Args:
        dim: model width.
        heads: H.
        q_rank: width that queries are compressed to, or None.
        kv_rank: R.
        nope: N.
        rope: P.
        value: V.
        rotary: whether what is P wide is rotated.
        rope_theta: base of the rotary wavelengths.
        interleave: whether a rotated pair is two neighbours.
        scale: of the scores; None for (N + P) ** -0.5.
        norm_eps: of the norms of what is compressed.
        bias: whether the compressions and the output have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        q_rank: int | None,
        kv_rank: int,
        nope: int,
        rope: int,
        value: int,
        rotary: bool = True,
        rope_theta: float = 10000.0,
        interleave: bool = True,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__(GrowingCache(latent=(kv_rank + rope,)))
        self.heads, self.rank = heads, kv_rank
        self.nope, self.rope, self.value = nope, rope, value
        self.rotary = rotary
        self.rope_theta = rope_theta
        self.interleave = interleave
        self.scale = (nope + rope) ** -0.5 if scale is None else scale
        if q_rank is None:
            self.q_proj = nn.Linear(dim, heads * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, q_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_rank, norm_eps)
            self.q_b_proj = nn.Linear(q_rank, heads * (nope + rope), bias=False)
        self.compresses_queries = q_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(dim, kv_rank + rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_rank, norm_eps)
        self.kv_b_proj = nn.Linear(kv_rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, dim, bias=bias)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.006)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def attend(self, queries: list[Tensor], slots: Mapping[str, Tensor], where: Places, far: Attended | None) -> Tensor:
        attend = self._absorbed if self._few(queries[0].shape[1]) else self._expanded
        return attend(queries[0], slots["latent"], where).flatten(2)

    def output(self, y: Tensor, queries: list[Tensor]) -> Tensor:
        return self.o_proj(y)  # type: ignore[no-any-return]

    def _few(self, count: int) -> bool:
        """Whether meeting `count` queries costs less with the latents of the slots than with keys and values of them.

        Per head and slot, the products with a latent are R + P and R wide, for every query; those with keys and values
        N + P and V, after R (N + V) multiplications that make them.
        """
        return count * (2 * self.rank - self.nope - self.value) <= self.rank * (self.nope + self.value)

    def project(
        self,
        x: Tensor,
        position: Tensor,
        recall: Recall | None = None,
        cross: Cross | None = None,
        leaves: bool = True,
    ) -> tuple[list[Tensor], dict[str, Tensor], Attended | None]:
        """Queries (B, T, H, N + P) and the latents (B, T, R + P), both rotated."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_queries else self.q_proj(x)
        q = q.unflatten(-1, (self.heads, -1))
        turn = turns(position, self.rope, self.rope_theta, x.dtype) if self.rotary else None
        if turn:
            q = rotary(q, *turn, first=self.nope, interleave=self.interleave)
        if not leaves:
            return [q], {}, None
        latent = self.kv_a_proj_with_mqa(x)
        latent = torch.cat([self.kv_a_layernorm(latent[..., : self.rank]), latent[..., self.rank :]], -1)
        if turn:
            latent = rotary(latent[:, :, None], *turn, first=self.rank, interleave=self.interleave)[:, :, 0]
        return [q], {"latent": latent}, None

    def _expanded(self, q_BTHK: Tensor, latent: Tensor, where: Places) -> Tensor:
        """(B, T, H, V) with the keys and values of every head and slot."""
        c, k_rope = latent.split([self.rank, self.rope], -1)
        k_nope, v = self.kv_b_proj(c).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], -1)
        k = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, self.heads, -1)], -1)
        return attention(q_BTHK, k, v, scale=self.scale, **where)

    def _absorbed(self, q_BTHK: Tensor, latent: Tensor, where: Places) -> Tensor:
        """The same: every head's keys and values are the latents, its queries and its means are turned to fit."""
        key, value = (
            self.kv_b_proj.weight.to(q_BTHK.dtype)
            .unflatten(0, (self.heads, self.nope + self.value))
            .split([self.nope, self.value], 1)
        )  # (H, N, R) and (H, V, R)
        q_nope, q_rope = q_BTHK.split([self.nope, self.rope], -1)
        q = torch.cat([torch.einsum("bthn,hnr->bthr", q_nope, key), q_rope], -1)
        # Means of whole slots: a part of each slot would be a copy of all, since kernels want one width.
        slots = latent[:, :, None]
        mean = attention(q, slots, slots, scale=self.scale, **where)
        return torch.einsum("bthr,hvr->bthv", mean[..., : self.rank], value)


def build(config: LatentAttentionConfig, ctx: BuildContext) -> LatentAttention:
    return LatentAttention(
        ctx.dim,
        heads=config.heads,
        q_rank=config.q_lora_rank,
        kv_rank=config.rank(ctx.dim),
        nope=config.nope(ctx.dim),
        rope=config.rope(ctx.dim),
        value=config.value(ctx.dim),
        rotary=config.rotary,
        rope_theta=config.rope_theta,
        interleave=config.rope_interleave,
        scale=config.scale,
        norm_eps=config.norm_eps,
        bias=config.bias,
    )
