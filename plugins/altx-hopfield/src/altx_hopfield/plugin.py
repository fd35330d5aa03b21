"""What altx-hopfield offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "hopfield",
            summary="Modern Hopfield network: each token retrieves from N learned patterns",
            description=(
                "q <- softmax(beta q K^T) K, repeated; y = W softmax(beta q K^T) V;  K, V from N learned patterns\n"
                "O(N) per token, head and update; no token sees another.\n"
                "State: none. The patterns are parameters, written by training.\n"
                "A small store of prototypes beside a mixer (residual) or in the feed-forward's place (ffn); beta and\n"
                "the updates decide whether one pattern comes back or a mean of many."
            ),
            build="altx_hopfield.hopfield:build",
            config="altx_hopfield.config:HopfieldConfig",
            capabilities="altx_hopfield.config:capabilities",
            paper="Ramsauer et al. 2020, Hopfield Networks is All You Need, arXiv:2008.02217",
            attach=("residual", "ffn"),
            default_attach="residual",
        )
    ]
