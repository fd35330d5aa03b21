"""The same numbers as reformer-pytorch and transformers, on their weights, with their rotations."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from altx_reformer.config import LocalConfig, ReformerConfig
from altx_reformer.local import LocalAttention
from altx_reformer.reformer import Reformer
from torch import Tensor, nn

from altx.context import Context

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    reformer_pytorch = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    local_attention = pytest.importorskip("local_attention")
    theirs_hf = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig as HFConfig

DIM = 48
SIZES = [(96, 8, 3, 4), (256, 16, 8, 2), (128, 64, 1, 2)]
"""Tokens, bucket size, rounds, heads."""
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-5}


def agree(ours: Any, theirs: Any, call: Any) -> None:
    """Compare outputs and gradients in float64, and our outputs in float32 with theirs in float64.

    In float32 theirs are 1e-3 off where a token sees nothing but itself: the logarithm of the rounds' sum is lost
    beside a score of -5e4 (-1e5 in transformers).
    """
    x = torch.randn(2, call.length, DIM, dtype=torch.float64, requires_grad=True)
    wanted, found = call(theirs, x), ours(x, call.ctx).y
    assert float((found - wanted).detach().abs().max()) < LIMITS[torch.float64]
    weights = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((y * weights).sum(), [x])[0] for y in (found, wanted)]
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-7
    single = ours.float()(x.detach().float(), call.ctx).y
    assert float((single.double() - wanted).detach().abs().max()) < LIMITS[torch.float32]


class Call:
    """How theirs are called."""

    def __init__(self, length: int, causal: bool, run: Any) -> None:
        self.length, self.ctx, self.run = length, Context(causal=causal), run

    def __call__(self, theirs: Any, x: Tensor) -> Tensor:
        found: Tensor = self.run(theirs, x)
        return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("causal", "across", "rotary"), list(itertools.product([False, True], repeat=3)))
def test_published_chunks_are_those_of_reformer_pytorch(
    size: tuple[int, ...], causal: bool, across: bool, rotary: bool
) -> None:
    length, bucket, rounds, heads = size
    torch.manual_seed(0)
    # full_attn_thres: not full attention instead, where the sequence is no longer than a bucket.
    theirs = reformer_pytorch.LSHSelfAttention(
        DIM, heads, bucket, rounds, causal=causal, attend_across_buckets=across, full_attn_thres=0
    ).double()
    config = ReformerConfig(
        heads=heads, bucket_size=bucket, n_hashes=rounds, num_buckets=length // bucket, chunking="published",
        attend_across_buckets=across, rotations_per_head=False, rotary=rotary,
    )  # fmt: skip
    ours = Reformer(DIM, config).double()
    assert ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys == ["rotations"]
    torch.manual_seed(5)
    ours.rotations = torch.randn(1, DIM // heads, rounds, length // bucket // 2, dtype=torch.float64)
    angles = None
    if rotary:
        embedding = reformer_pytorch.FixedPositionalEmbedding(DIM // heads).double()
        # Theirs are computed in float32 whatever the dtype.
        exponent = torch.arange(0, DIM // heads, 2, dtype=torch.float64) / (DIM // heads)
        embedding.inv_freq = 10000.0**-exponent
        angles = embedding(torch.empty(1, length, 1, dtype=torch.float64))

    def run(theirs: Any, x: Tensor) -> Any:
        torch.manual_seed(5)
        return theirs(x, pos_emb=angles)

    agree(ours, theirs, Call(length, causal, run))


@pytest.mark.parametrize("length", [16, 64])
def test_the_causal_form_is_the_published_one_where_no_bucket_holds_more_than_a_chunk(length: int) -> None:
    torch.manual_seed(0)
    theirs = reformer_pytorch.LSHSelfAttention(
        DIM, 2, length // 2, 3, causal=True, attend_across_buckets=False, full_attn_thres=0
    ).double()
    config = ReformerConfig(
        heads=2, bucket_size=length // 2, n_hashes=3, num_buckets=2, rotations_per_head=False, rotary=False
    )
    ours = Reformer(DIM, config).double()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    torch.manual_seed(5)
    ours.rotations = torch.randn(1, DIM // 2, 3, 1, dtype=torch.float64)
    half = torch.randn(2, length // 2, DIM, dtype=torch.float64)
    # x and -x fall on opposite sides of every direction: each of the two buckets gets half of the tokens.
    x = torch.cat([half, -half], 1)[:, torch.randperm(length)]
    torch.manual_seed(5)
    assert float((ours(x).y - theirs(x)).detach().abs().max()) < 1e-8


def hf_config(**changes: Any) -> Any:
    return HFConfig(
        hidden_size=DIM, axial_pos_embds=False, lsh_num_chunks_after=0, lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0, hash_seed=7, **changes,
    )  # fmt: skip


def hf_run(theirs: Any, x: Tensor) -> Any:
    return theirs(x).hidden_states


def identity(layer: nn.Linear) -> None:
    """Theirs have their output projection elsewhere."""
    with torch.no_grad():
        layer.weight.copy_(torch.eye(DIM))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("buckets", [4, [4, 2]])
@pytest.mark.parametrize("causal", [False, True])
def test_published_chunks_are_those_of_transformers(size: tuple[int, ...], buckets: Any, causal: bool) -> None:
    length, bucket, rounds, heads = size
    torch.manual_seed(0)
    theirs = (
        theirs_hf.LSHSelfAttention(
            hf_config(
                num_attention_heads=heads, attention_head_size=DIM // heads, lsh_attn_chunk_length=bucket,
                num_hashes=rounds, num_buckets=buckets, is_decoder=causal,
            )
        )
        .double()
        .eval()
    )  # fmt: skip
    config = ReformerConfig(
        heads=heads, bucket_size=bucket, n_hashes=rounds, num_buckets=buckets, chunking="published", scale=1.0,
        norm_eps=1e-6, rotary=False, out_bias=False,
    )  # fmt: skip
    ours = Reformer(DIM, config).double()
    ours.toqk.weight, ours.tov.weight = theirs.query_key.weight, theirs.value.weight
    identity(ours.to_out)
    torch.manual_seed(7)
    ours.rotations = torch.randn(heads, DIM // heads, rounds, sum(config.factors) // 2, dtype=torch.float64)
    agree(ours, theirs, Call(length, causal, hf_run))


@pytest.mark.parametrize(("before", "chunk"), [(1, 8), (3, 4), (0, 16)])
def test_causal_local_attention_is_that_of_transformers(before: int, chunk: int) -> None:
    torch.manual_seed(0)
    hf = hf_config(
        num_attention_heads=4, attention_head_size=12, local_attn_chunk_length=chunk, is_decoder=True,
        local_num_chunks_before=before, local_num_chunks_after=0,
    )  # fmt: skip
    theirs = theirs_hf.LocalSelfAttention(hf).double().eval()
    config = LocalConfig(heads=4, chunk_size=chunk, before=before, rotary=False, out_bias=False)
    ours = LocalAttention(DIM, config).double()
    for name in ("query", "key", "value"):
        getattr(ours, name).weight = getattr(theirs, name).weight
    identity(ours.to_out)
    agree(ours, theirs, Call(64, True, hf_run))


@pytest.mark.parametrize(("before", "after", "chunk"), [(1, 1, 8), (2, 1, 4)])
def test_local_attention_both_ways_is_that_of_reformer_pytorch(before: int, after: int, chunk: int) -> None:
    """Its LocalAttention (of the distribution local-attention), which knows no circle: transformers' has one."""
    torch.manual_seed(0)
    config = LocalConfig(heads=4, chunk_size=chunk, before=before, after=after, rotary=False, out_bias=False)
    ours = LocalAttention(DIM, config).double()
    identity(ours.to_out)
    theirs = local_attention.LocalAttention(
        chunk, causal=False, look_backward=before, look_forward=after, use_rotary_pos_emb=False
    )
    weights = [layer.weight.detach().clone() for layer in (ours.query, ours.key, ours.value)]

    def run(theirs: Any, x: Tensor) -> Any:
        q, k, v = ((x @ w.T).unflatten(-1, (4, -1)).transpose(1, 2) for w in weights)
        return theirs(q, k, v).transpose(1, 2).flatten(2)

    agree(ours, theirs, Call(40, False, run))
