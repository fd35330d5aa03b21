"""What this distribution offers to altx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx.hookspecs import hookimpl
from altx.spec import MixerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            "attention",
            summary="Softmax attention: grouped queries, rotary, window, sinks, soft cap, norms of q and k, gate",
            description=(
                "y_t = W_o sum_j softmax_j(q_t . k_j / sqrt(head_dim)) v_j, j <= t, per head; q and k are rotated\n"
                "4 T^2 heads head_dim FLOPs over T tokens, half of it if causal; 4 T window with a window.\n"
                "State: 2 kv_heads head_dim numbers per token; with a window, for the last window - 1 tokens only.\n"
                "kv_heads < heads shrinks the state (grouped-query attention); kv_heads 1 is multi-query attention.\n"
                "Use it where exact recall matters; in a hybrid, one attention layer to several recurrent ones."
            ),
            build="altx_attention.attention:build",
            config="altx_attention.config:AttentionConfig",
            capabilities="altx_attention.config:capabilities",
            paper=(
                "Vaswani et al. 2017, arXiv:1706.03762; Su et al. 2021, RoFormer, arXiv:2104.09864; "
                "Ainslie et al. 2023, GQA, arXiv:2305.13245"
            ),
        ),
        MixerSpec(
            "mla",
            summary="Multi-head latent attention: keys and values of all heads from one small latent per token",
            description=(
                "c_t = norm(W x_t); k_t = [W_UK c_t, rotated key of all heads]; v_t = W_UV c_t; softmax attention\n"
                "Costs what multi-head attention costs, T^2. Decoding meets the latents as they are, since W_UK and\n"
                "W_UV move to the query's side: only reading the state grows with the tokens seen.\n"
                "State: kv_lora_rank + qk_rope_head_dim numbers per token for all heads (576 in DeepSeek-V3).\n"
                "Use it where attention's state is what limits you and grouped queries lose too much."
            ),
            build="altx_attention.mla:build",
            config="altx_attention.mla_config:LatentAttentionConfig",
            capabilities="altx_attention.mla_config:capabilities",
            paper=(
                "DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, section 2.1; "
                "Kimi Team 2025, Kimi Linear, arXiv:2510.26692 (without positions)"
            ),
        ),
    ]
