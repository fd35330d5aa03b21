"""What altx itself offers, through the same hooks as any plugin: the dense feed-forward layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx.hookspecs import hookimpl
from altx.spec import FeedForwardSpec

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_feed_forwards() -> Iterable[FeedForwardSpec]:
    return [
        FeedForwardSpec(
            "swiglu",
            summary="Gated feed-forward, the usual choice beside attention",
            description=(
                "y = W_down(silu(W_gate x) * W_up x)\n"
                "6 D F FLOPs per token, no state. The default of every block; also an expert."
            ),
            build="altx.feed_forward:build_swiglu",
            config="altx.feed_forward_config:SwiGLUConfig",
            capabilities="altx.feed_forward_config:capabilities",
            grouped="altx.feed_forward:build_swiglu_bank",
            paper="Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202",
        ),
        FeedForwardSpec(
            "mlp",
            summary="Two linear maps with an activation between",
            description=(
                "y = W_down(f(W_up x))\n4 D F FLOPs per token, no state. The feed-forward of the 2017 Transformer."
            ),
            build="altx.feed_forward:build_mlp",
            config="altx.feed_forward_config:MLPConfig",
            capabilities="altx.feed_forward_config:capabilities",
            paper="Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762",
        ),
    ]
