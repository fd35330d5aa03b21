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
            summary="Softmax attention: multi-head or grouped-query, rotary, optional sliding window",
            description=(
                "y_t = W_o sum_j softmax_j(q_t . k_j / sqrt(head_dim)) v_j, j <= t, per head; q and k are rotated\n"
                "4 T^2 heads head_dim FLOPs over T tokens, half of it if causal; through torch's fused kernels.\n"
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
        )
    ]
