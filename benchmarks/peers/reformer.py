"""LSH attention beside reformer-pytorch's, with its heads, bucket size and rounds; in an encoder, and causal.

In the encoder the two are one function, but for the random rotations. The causal ones differ: ours sees earlier tokens
of the same bucket only, so that no token depends on a later one; theirs sees the chunks of the whole sequence's order.

Local attention beside that of transformers, causal and without rotations, where the two compute the same numbers.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from altx.context import Context
from peers import Case, layer


def cases(dim: int, length: int) -> list[Case]:
    found = []
    for causal in (True, False):
        ours = layer("reformer", dim, num_buckets=max(length // 64, 2) // 2 * 2, rotary=False)
        peers = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from reformer_pytorch import LSHSelfAttention
        except ImportError:
            pass
        else:
            theirs = LSHSelfAttention(dim, heads=8, bucket_size=64, n_hashes=8, causal=causal).train(ours.training)
            theirs.load_state_dict(ours.state_dict(), strict=False)
            peers["reformer-pytorch"] = theirs
        ctx = Context(causal=causal)

        def run(x: Tensor, ours: torch.nn.Module = ours, ctx: Context = ctx) -> Tensor:
            y: Tensor = ours(x, ctx).y
            return y

        found.append(Case("reformer" if causal else "reformer[encoder]", run, ours, peers, exact=False))
    return [*found, *_local(dim)]


def _local(dim: int) -> list[Case]:
    ours = layer("reformer-local", dim, rotary=False)
    peers = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import ReformerConfig
            from transformers.models.reformer.modeling_reformer import LocalSelfAttention
    except ImportError:
        pass
    else:
        config = ReformerConfig(
            hidden_size=dim, num_attention_heads=8, attention_head_size=dim // 8, local_attn_chunk_length=64,
            is_decoder=True, axial_pos_embds=False, local_attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        theirs = LocalSelfAttention(config)
        theirs.load_state_dict(ours.state_dict(), strict=False)
        peers["transformers"] = lambda x: ours.to_out(theirs(x).hidden_states)
    return [Case("reformer-local", lambda x: ours(x).y, ours, peers)]
