"""What this distribution offers to altx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx.hookspecs import hookimpl
from altx.spec import MixerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

PAPER = "Kitaev, Kaiser & Levskaya 2020, Reformer: The Efficient Transformer, arXiv:2001.04451"


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            "reformer",
            summary="Reformer: softmax attention among tokens that locality-sensitive hashing puts in one bucket",
            description=(
                "y_t = W_o sum_j softmax_j(q_t . q_j / (|q_j| sqrt(head_dim))) v_j, over the j that share a bucket\n"
                "with t in one of n_hashes rounds; bucket = argmax([q R, -q R]) for random R; j = t if no other does.\n"
                "Causal: j is one of the last bucket_size tokens of t's bucket. Encoder: buckets sorted and chunked,\n"
                "a chunk sees itself and the one before, as published. T log T time, memory linear in T.\n"
                "State: 2 dim + n_hashes heads numbers per token; a step reads it all, as attention does.\n"
                "Use it for long sequences in one go (training, encoders); below about 10,000, attention is faster."
            ),
            build="altx_reformer.reformer:build",
            config="altx_reformer.config:ReformerConfig",
            capabilities="altx_reformer.config:capabilities",
            paper=PAPER,
        ),
        MixerSpec(
            "reformer-local",
            summary="Reformer's local attention: softmax attention within a chunk and the chunk before it",
            description=(
                "y_t = W_o sum_j softmax_j(q_t . k_j / sqrt(head_dim)) v_j, j in t's chunk of chunk_size tokens or\n"
                "in one of the `before` chunks in front of it (an encoder: or `after` behind it); j <= t if causal.\n"
                "Linear in T: 4 chunk_size (1 + before) dim FLOPs per token beside the projections.\n"
                "State: the last (1 + before) chunk_size - 1 keys and values, 2 dim numbers each, however long T.\n"
                "Use it beside `reformer` or a recurrent mixer: near tokens exactly, far ones not at all."
            ),
            build="altx_reformer.local:build",
            config="altx_reformer.config:LocalConfig",
            capabilities="altx_reformer.config:local_capabilities",
            paper=PAPER,
        ),
    ]
