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
    ]
