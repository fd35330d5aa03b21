"""LSH attention against its definition, and what makes it causal, reproducible and independent of padding."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from altx_reformer import attend, reformer
from altx_reformer.config import LocalConfig, ReformerConfig
from altx_reformer.local import LocalAttention
from altx_reformer.reformer import Reformer
from torch import Tensor

from altx.compose import compose
from altx.context import Context
from altx.errors import CompositionError, UnsupportedContext

SMALL: dict[str, Any] = {"heads": 2, "bucket_size": 4, "num_buckets": 4, "n_hashes": 3, "rotary": False}


def layer(**changes: Any) -> Reformer:
    torch.manual_seed(0)
    return Reformer(16, ReformerConfig(**{**SMALL, **changes})).double().eval()


def inputs(batch: int = 2, length: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(mixer: Reformer, x: Tensor) -> Tensor:
    """The causal form in loops: sums of exponentials over the rounds, and over the last tokens of a bucket."""
    config, width = mixer.config, mixer.width
    y = torch.zeros(*x.shape[:2], config.heads, width, dtype=x.dtype)
    for row, head in itertools.product(range(len(x)), range(config.heads)):
        part = slice(head * width, (head + 1) * width)
        q, v = x[row] @ mixer.toqk.weight[part].T, x[row] @ mixer.tov.weight[part].T
        turned = torch.einsum("td,drk->trk", q, mixer.rotations[head if config.rotations_per_head else 0])
        buckets = torch.cat([turned, -turned], -1).argmax(-1)
        for t in range(x.shape[1]):
            total, mean = torch.zeros((), dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
            for r in range(config.n_hashes):
                mates = [j for j in range(t) if buckets[j, r] == buckets[t, r]][-config.bucket_size :]
                for j in mates:
                    weight = (q[t] @ q[j] / q[j].norm() / width**0.5).exp()
                    total, mean = total + weight, mean + weight * v[j]
            y[row, t, head] = mean / total if total > 0 else v[t]
    return mixer.to_out(y.flatten(2))


@pytest.mark.parametrize("changes", [{}, {"bucket_size": 2, "num_buckets": 2}, {"rotations_per_head": False}])
def test_the_causal_form_is_its_definition_and_its_derivative(changes: dict[str, Any]) -> None:
    mixer, x = layer(**changes), inputs().requires_grad_()
    found, wanted = mixer(x).y, by_definition(mixer, x)
    assert float((found - wanted).detach().abs().max()) < 1e-10
    weights = inputs(seed=2)
    varied = [x, *mixer.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), varied) for y in (found, wanted)), strict=True):
        assert float((a - b).abs().max()) < 1e-10


@pytest.mark.parametrize("scores", [1, 64, 1 << 20])
@pytest.mark.parametrize("causal", [True, False])
def test_the_size_of_the_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch, scores: int, causal: bool) -> None:
    mixer, x, ctx = layer(bucket_size=32, n_hashes=2), inputs(2, 100).requires_grad_(), Context(causal=causal)
    wanted = mixer(x, ctx).y
    slope = torch.autograd.grad(wanted.sum(), x)[0]
    monkeypatch.setitem(attend.PIECE, "cpu", scores)
    found = mixer(x, ctx).y
    assert float((found - wanted).detach().abs().max()) < 1e-12
    assert float((torch.autograd.grad(found.sum(), x)[0] - slope).abs().max()) < 1e-12


@pytest.mark.parametrize("few", [0, 1 << 30])
def test_any_split_is_the_whole_sorted_again_or_not(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    mixer, x = layer(bucket_size=2, rotary=True), inputs(2, 30)
    monkeypatch.setattr(reformer, "FEW", few)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.7
    reset = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) < 0.1
    ctx = Context(mask=mask, reset=reset)
    whole, state, parts = mixer(x, ctx).y, mixer.init_state(2, capacity=7), []
    for start, stop in itertools.pairwise([0, 3, 4, 17, 30]):
        out = mixer(x[:, start:stop], ctx.slice(start, stop), state)
        parts.append(out.y)
        state = out.state
    assert float((torch.cat(parts, 1) - whole)[mask].detach().abs().max()) < 1e-12


def test_no_output_of_the_causal_form_depends_on_a_later_token_and_published_chunks_leak() -> None:
    x, worst = inputs(1, 64), {}
    for chunking in ("causal", "published"):
        mixer = layer(chunking=chunking)
        before, worst[chunking] = mixer(x).y, 0.0
        for cut in (8, 31, 63):
            changed = x.clone()
            changed[:, cut:] = -3 * x[:, cut:] + 1
            gap = (mixer(changed).y - before)[:, :cut].detach().abs().max()
            worst[chunking] = max(worst[chunking], float(gap))
    assert worst["causal"] < 1e-10
    # What makes the other form: later tokens move earlier ones to other chunks.
    assert worst["published"] > 1e-3


def test_a_causal_model_of_published_chunks_is_refused_and_an_encoder_is_not() -> None:
    mixer = {"name": "reformer", "chunking": "published"}
    with pytest.raises(CompositionError, match="lets a token see later ones"):
        compose({"dim": 16, "mixer": [mixer]})
    compose({"dim": 16, "mixer": [mixer], "causal": False, "head": {"kind": "classifier", "classes": 2}})


def test_rotations_follow_the_seed_and_the_block_and_are_saved() -> None:
    def table(seed: int, block: int) -> Tensor:
        return Reformer(16, ReformerConfig(**SMALL, hash_seed=seed), block).rotations

    assert torch.equal(table(0, 0), table(0, 0))
    assert not torch.equal(table(0, 0), table(0, 1))
    assert not torch.equal(table(0, 1), table(1, 0))
    assert "rotations" in layer().state_dict()


def test_a_generator_gives_fresh_rotations_in_training_only() -> None:
    mixer, x = layer(), inputs()

    def run(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found: Tensor = mixer(x, Context(generator=generator)).y
        return found

    assert torch.equal(run(1), run(None))
    mixer.train()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1), run(None))
    # With a state, a sequence goes on as it began.
    state = mixer.init_state(2)
    generator = torch.Generator().manual_seed(1)
    assert float((mixer(x, Context(generator=generator), state).y - run(None)).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("across", [True, False])
def test_an_encoder_does_not_see_padding_even_where_chunks_close_the_circle(across: bool) -> None:
    mixer, ctx = layer(chunking="published", attend_across_buckets=across), Context(causal=False)
    for length in (1, 4, 7, 16):
        x = inputs(1, length)
        alone = mixer(x, ctx).y
        wide = torch.full((1, 23, 16), float("nan"), dtype=torch.float64)
        mask = torch.zeros(1, 23, dtype=torch.bool)
        places = torch.randperm(23, generator=torch.Generator().manual_seed(length))[:length].sort().values
        wide[0, places], mask[0, places] = x[0], True
        assert float((mixer(wide, ctx.replace(mask=mask)).y[mask] - alone[0]).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_an_encoder_takes_documents_of_a_row_as_rows(kind: str) -> None:
    mixer = layer() if kind == "lsh" else LocalAttention(16, LocalConfig(heads=2, chunk_size=3)).double()
    x, ctx = inputs(2, 20), Context(causal=False)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 3] = mask[1, 0] = False
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 3] = reset[0, 11] = reset[1, 5] = True
    found = mixer(x, ctx.replace(mask=mask, reset=reset)).y
    for row, start, stop in ((0, 0, 11), (0, 11, 20), (1, 0, 5), (1, 5, 20)):
        real = mask[row, start:stop]
        alone = mixer(x[row : row + 1, start:stop][:, real], ctx).y[0]
        assert float((found[row, start:stop][real] - alone).detach().abs().max()) < 1e-12
    nothing = ctx.replace(mask=torch.zeros_like(mask), reset=reset)
    assert bool(mixer(x, nothing).y.isfinite().all())


def test_a_token_that_sees_only_itself_gets_its_own_value_also_in_float32_and_bfloat16() -> None:
    mixer, x = layer(n_hashes=8, out_bias=False), inputs(2, 1)
    wanted = mixer.to_out(mixer.tov(x))
    assert float((mixer(x).y - wanted).detach().abs().max()) < 1e-12
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        y = copy.deepcopy(mixer).to(dtype)(x.to(dtype)).y
        assert y.dtype == dtype
        assert float((y.double() - wanted).detach().abs().max()) < limit


@pytest.mark.parametrize("state", [False, True])
def test_autocast_gives_bfloat16_and_trains(state: bool) -> None:
    mixer, x = layer().float().train(), inputs().float()
    held = mixer.init_state(2) if state else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x, Context(), held).y
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert float((y.float() - mixer(x).y).detach().abs().max()) < 0.1
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["reformer", "reformer-local"])
def test_both_directions_continue_no_state(name: str) -> None:
    mixer = layer() if name == "reformer" else LocalAttention(16, LocalConfig(heads=2)).double()
    with pytest.raises(UnsupportedContext, match="whole sequence at once"):
        mixer(inputs(), Context(causal=False), mixer.init_state(2))


def test_local_attention_is_its_definition() -> None:
    torch.manual_seed(0)
    mixer = LocalAttention(16, LocalConfig(heads=2, chunk_size=3, before=2, after=1, rotary=False)).double()
    x = inputs(1, 20)
    for causal in (True, False):
        q, k, v = ((layer(x)[0]).unflatten(-1, (2, -1)) for layer in (mixer.query, mixer.key, mixer.value))
        y = torch.zeros_like(q)
        for t, head in itertools.product(range(20), range(2)):
            seen = [j for j in range(20) if -2 <= j // 3 - t // 3 <= 1 and (j <= t or not causal)]
            weights = torch.stack([q[t, head] @ k[j, head] / 8**0.5 for j in seen]).softmax(0)
            y[t, head] = sum(w * v[j, head] for w, j in zip(weights, seen, strict=True))
        wanted = mixer.to_out(y.flatten(1))
        assert float((mixer(x, Context(causal=causal)).y[0] - wanted).detach().abs().max()) < 1e-12
