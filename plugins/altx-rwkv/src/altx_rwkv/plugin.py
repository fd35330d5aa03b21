"""What this distribution offers to altx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx.hookspecs import hookimpl
from altx.spec import FeedForwardSpec, MixerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

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
            build="altx_rwkv.channel:build",
            config="altx_rwkv.config:ChannelConfig",
            capabilities="altx_rwkv.config:recurrent",
            paper=RWKV4,
        ),
    ]
