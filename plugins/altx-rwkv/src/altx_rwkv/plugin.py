"""What this distribution offers to altx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx.hookspecs import hookimpl
from altx.spec import FeedForwardSpec, MixerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

RWKV5 = "Peng et al. 2024, Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, arXiv:2404.05892"
RWKV7 = "Peng et al. 2025, RWKV-7 'Goose' with Expressive Dynamic State Evolution, arXiv:2503.14456"
RWKV4 = "Peng et al. 2023, RWKV: Reinventing RNNs for the Transformer Era, arXiv:2305.13048"


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            "rwkv4",
            summary="RWKV-4 time mixing: a mean of all values so far per channel, weighted by keys that decay",
            description=(
                "wkv_t = (sum_{i<t} e^{k_i + (t-1-i) w} v_i + e^{k_t + u} v_t) / (the same without v), per channel,\n"
                "y_t = W_o (sigmoid(r_t) * wkv_t); k, v and r see a mixture of x_t and x_{t-1}, the token shift.\n"
                "Linear in T: 8 D^2 FLOPs of projections and about 14 D of recurrence per token.\n"
                "State: 3 D numbers per row however long the sequence, the smallest there is, so it recalls little.\n"
                "Use it with feed-forward rwkv4-channel and norm layer, for RWKV-4 checkpoints or the cheapest state."
            ),
            build="altx_rwkv.rwkv4:build",
            config="altx_rwkv.config:RWKV4Config",
            capabilities="altx_rwkv.config:recurrent",
            paper=RWKV4,
        ),
        MixerSpec(
            "rwkv5",
            summary="RWKV-5 (Eagle) time mixing: heads with a matrix each, whose rows decay at constant rates",
            description=(
                "S_t = diag(w) S_{t-1} + k_t v_t^T,  o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),\n"
                "y_t = W_o (norm(o_t) * silu(g_t)), in heads of K channels; r, k, v, g see x_t and x_{t-1} mixed.\n"
                "Linear in T: 10 D^2 FLOPs of projections and about 6 D K of recurrence per token.\n"
                "State: D K + D numbers per row however long the sequence, K = head_dim.\n"
                "Use it with feed-forward rwkv5-channel and norm layer; rwkv6 decays as the token says."
            ),
            build="altx_rwkv.rwkv5:build",
            config="altx_rwkv.config:RWKV5Config",
            capabilities="altx_rwkv.config:recurrent",
            paper=RWKV5,
        ),
        MixerSpec(
            "rwkv6",
            summary="RWKV-6 (Finch) time mixing: heads with a matrix each, whose rows decay as the token says",
            description=(
                "S_t = diag(w_t) S_{t-1} + k_t v_t^T,  o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),\n"
                "y_t = W_o (norm(o_t) * silu(g_t)), in heads of K channels. w_t and how much of x_{t-1} goes into\n"
                "r, k, v, g and w depend on the token, by projections of low rank.\n"
                "Linear in T: 10 D^2 + 20 D M + 4 D R FLOPs of projections and about 6 D K of recurrence per token,\n"
                "M = mix_rank, R = decay_rank. State: D K + D numbers per row for ever, K = head_dim.\n"
                "Use it with feed-forward rwkv6-channel and norm layer, as a gated linear attention that is well tried."
            ),
            build="altx_rwkv.rwkv6:build",
            config="altx_rwkv.config:RWKV6Config",
            capabilities="altx_rwkv.config:recurrent",
            paper=RWKV5,
        ),
        MixerSpec(
            "rwkv7",
            summary="RWKV-7 (Goose) time mixing: heads with a matrix each, which learns in context by a delta rule",
            description=(
                "S_t = (diag(w_t) - (a_t kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T,  o_t = r_t^T S_t,\n"
                "y_t = W_o ((norm(o_t) + (r_t k_t r_k).sum() v_t) * g_t), in heads of K channels; w, a and g are\n"
                "projections of low rank. The first such layer of a model exports v_first, its values (B, T, D);\n"
                "those after it blend it into theirs. As a router's target with none before it, one does neither.\n"
                "Linear in T: 8 D^2 FLOPs of projections, as much again for low ranks at small D, and about 10 D K of\n"
                "recurrence per token. State: D K + D numbers per row however long the sequence, K = head_dim.\n"
                "Use it with feed-forward rwkv7-channel and norm layer, where a linear model shall track state."
            ),
            build="altx_rwkv.rwkv7:build",
            config="altx_rwkv.config:RWKV7Config",
            capabilities="altx_rwkv.config:rwkv7",
            paper=RWKV7,
        ),
    ]


@hookimpl
def altx_feed_forwards() -> Iterable[FeedForwardSpec]:
    return [
        FeedForwardSpec(
            "rwkv4-channel",
            summary="RWKV-4 channel mixing: a gated feed-forward that also sees the token before",
            description=(
                "y_t = sigmoid(W_r xr) * W_v relu(W_k xk)^2, where xk and xr are mixtures of x_t and x_{t-1}.\n"
                "2 D^2 + 4 D F FLOPs per token, F = 4 D. State: D numbers per row, the last token.\n"
                "Use it as the feed-forward of rwkv4."
            ),
            build="altx_rwkv.channel:build4",
            config="altx_rwkv.config:ChannelConfig",
            capabilities="altx_rwkv.config:recurrent",
            paper=RWKV4,
        ),
        FeedForwardSpec(
            "rwkv5-channel",
            summary="RWKV-5 (Eagle) channel mixing: that of RWKV-4, 3.5 times as wide as the model",
            description=(
                "y_t = sigmoid(W_r xr) * W_v relu(W_k xk)^2, where xk and xr are mixtures of x_t and x_{t-1}.\n"
                "2 D^2 + 4 D F FLOPs per token, F = 3.5 D. State: D numbers per row, the last token.\n"
                "The layer is that of rwkv4-channel, but for the default of F and the first W_k. For rwkv5."
            ),
            build="altx_rwkv.channel:build5",
            config="altx_rwkv.config:RWKV5ChannelConfig",
            capabilities="altx_rwkv.config:recurrent",
            paper=RWKV5,
        ),
        FeedForwardSpec(
            "rwkv6-channel",
            summary="RWKV-6 (Finch) channel mixing: that of RWKV-5 with other names and first weights",
            description=(
                "y_t = sigmoid(W_r xr) * W_v relu(W_k xk)^2, where xk and xr are mixtures of x_t and x_{t-1}.\n"
                "2 D^2 + 4 D F FLOPs per token, F = 3.5 D. State: D numbers per row, the last token.\n"
                "The function is that of rwkv5-channel; its parameters say how much of x_{t-1} goes in, not of x_t.\n"
                "Use it as the feed-forward of rwkv6."
            ),
            build="altx_rwkv.channel:build6",
            config="altx_rwkv.config:RWKV5ChannelConfig",
            capabilities="altx_rwkv.config:recurrent",
            paper=RWKV5,
        ),
        FeedForwardSpec(
            "rwkv7-channel",
            summary="RWKV-7 (Goose) channel mixing: a squared-ReLU feed-forward that also sees the token before",
            description=(
                "y_t = W_v relu(W_k xk)^2, where xk is a mixture of x_t and x_{t-1}: that of RWKV-6 without its gate.\n"
                "4 D F FLOPs per token, F = 4 D. State: D numbers per row, the last token.\n"
                "Use it as the feed-forward of rwkv7."
            ),
            build="altx_rwkv.channel:build7",
            config="altx_rwkv.config:ChannelConfig",
            capabilities="altx_rwkv.config:recurrent",
            paper=RWKV7,
        ),
    ]
