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
            "linear-attention",
            summary="Linear attention: softmax's kernel replaced by a feature map, normalised",
            description=(
                "S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  y_t = S_t^T phi(q_t) / z_t . phi(q_t),\n"
                "in heads, phi(x) = elu(x) + 1 by default: attention whose cost is linear in T. Without ctx.causal\n"
                "every token reads the sums over all of them.\n"
                "Linear in T: 8 D^2 FLOPs of projections and 4 D K of recurrence per token, K = D / heads.\n"
                "State: D (K + 1) numbers per row however long the sequence.\n"
                "Use it as the baseline of its family: nothing is ever forgotten, so gla or the delta rule recall more."
            ),
            build="altx_linear_attention.linear_attention:build",
            config="altx_linear_attention.config:LinearAttentionConfig",
            capabilities="altx_linear_attention.config:linear_attention",
            paper="Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236",
        ),
        MixerSpec(
            "gla",
            summary="Gated linear attention: a decay for every key channel, computed from the token",
            description=(
                "S_t = diag(a_t) S_{t-1} + k_t v_t^T,  y_t = W_o (norm(S_t^T q_t) * silu(W_g x_t)), in heads;\n"
                "a_t = sigmoid(low-rank map of x_t)^(1/16), so that each token decides what each row of S forgets.\n"
                "Linear in T: about 8 D^2 FLOPs of projections and 5 D K of recurrence per token, K = D / 2 / heads.\n"
                "State: D K numbers per row however long the sequence; 3 inputs more per channel with short_conv.\n"
                "Use it where a model has to forget selectively and training must stay matrix products."
            ),
            build="altx_linear_attention.gla:build",
            config="altx_linear_attention.gla_config:GLAConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Yang et al. 2023, Gated Linear Attention Transformers, arXiv:2312.06635",
        ),
        MixerSpec(
            "gated-deltanet",
            summary="Gated DeltaNet: a state that decays as Mamba-2's and is corrected by the delta rule",
            description=(
                "S_t = alpha_t (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  y_t = W_o (norm(S_t^T q_t) * silu(z_t)),\n"
                "in heads; q, k of length 1 behind short convolutions, alpha_t and beta_t one number per head and token:\n"
                "what k_t recalls is replaced by v_t, and everything fades at a rate that the token chooses.\n"
                "Linear in T: 12 D^2 FLOPs of projections and 7 V K per value head of recurrence per token.\n"
                "State: V K numbers per value head, 3 inputs per channel of q, k, v, however long the sequence.\n"
                "The linear mixer of Qwen3-Next and Olmo-Hybrid: a strong default, with attention in every fourth block."
            ),
            build="altx_linear_attention.gated_deltanet:build",
            config="altx_linear_attention.gated_deltanet_config:GatedDeltaNetConfig",
            capabilities="altx_linear_attention.config:recurrent",
            paper="Yang, Kautz & Hatamizadeh 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464",
        ),
    ]
