"""Features are drawn anew between steps, reproducibly, and no running state notices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from altx_performer.config import PerformerConfig
from altx_performer.features import draw
from altx_performer.performer import Performer, build

from altx import checkpoint
from altx.compose import compose
from altx.context import Context
from altx.errors import ConfigError, UnsupportedContext
from altx.layer import StepInfo
from altx.model import Model
from altx.spec import BuildContext

DIM = 16


def make(layer: int = 0, **settings: object) -> Performer:
    torch.manual_seed(0)
    return build(PerformerConfig(**settings), BuildContext(dim=DIM, layer=layer)).double()


def features(layer: Performer) -> torch.Tensor:
    return layer.fast_attention.projection_matrix.clone()


def test_features_are_redrawn_every_so_many_optimizer_steps_and_never_by_a_call() -> None:
    layer = make(redraw_interval=3).train()
    first = before = features(layer)
    for step in range(1, 10):
        layer(torch.randn(1, 4, DIM, dtype=torch.float64)).y.sum().backward()
        assert torch.equal(features(layer), before)
        layer.on_step(StepInfo(step))
        assert torch.equal(features(layer), before) == (step % 3 != 0)
        before = features(layer)
    assert not torch.equal(before, first)
    kept = make(redraw_interval=None)
    kept.on_step(StepInfo(1000))
    assert torch.equal(features(kept), first)


def test_a_redraw_depends_on_seed_layer_and_step_alone() -> None:
    drawn = {}
    for seed, layer, step in [(0, 0, 1000), (1, 0, 1000), (0, 1, 1000), (0, 0, 2000)]:
        found = []
        for before in (1, 2):
            performer = make(layer, seed=seed)
            performer.fast_attention.redraw(1000 * before)
            torch.manual_seed(before)
            performer.on_step(StepInfo(step))
            found.append(features(performer))
        assert torch.equal(*found)
        drawn[seed, layer, step] = found[0]
    values = list(drawn.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    # The global generator is left alone.
    torch.manual_seed(7)
    make().on_step(StepInfo(1000))
    state = torch.get_rng_state()
    performer.on_step(StepInfo(3000))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("count", "width"), [(3, 5), (5, 5), (13, 5), (266, 64)])
def test_rows_of_a_block_are_orthogonal(count: int, width: int) -> None:
    W = draw(count, width, "gaussian", torch.Generator().manual_seed(0))
    assert W.shape == (count, width) and W.dtype == torch.float64
    for block in W.split(width):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-12, rtol=0)
    constant = draw(count, width, "constant", torch.Generator().manual_seed(0))
    torch.testing.assert_close(constant.norm(dim=1), torch.full((count,), width**0.5, dtype=torch.float64))


@torch.no_grad()
def test_a_state_is_continued_with_the_features_it_was_made_with() -> None:
    layer = make(redraw_interval=1)
    x = torch.randn(3, 10, DIM, dtype=torch.float64)
    old_whole, old = layer(x).y, layer(x[:, :6], Context(), layer.init_state(3)).state
    layer.on_step(StepInfo(1))
    new_whole, new = layer(x).y, layer(x[:, :6], Context(), layer.init_state(3)).state
    assert (old_whole - new_whole).abs().max() > 1e-3
    torch.testing.assert_close(layer(x[:, 6:], Context(), old).y, old_whole[:, 6:], atol=1e-11, rtol=0)
    # Rows of both kinds in one batch, each with its own.
    mixed = new.where(torch.tensor([True, False, True]), old)
    expected = new_whole.clone()
    expected[1] = old_whole[1]
    torch.testing.assert_close(layer(x[:, 6:], Context(), mixed).y, expected[:, 6:], atol=1e-11, rtol=0)


def test_training_resumes_with_the_same_features(tmp_path: Path) -> None:
    model = compose({"dim": DIM, "layers": 2, "mixer": [{"name": "performer", "redraw_interval": 2}]}, seed=0)

    def steps(model: Model, first: int, last: int) -> None:
        for step in range(first, last):
            model.on_step(StepInfo(step))

    steps(model, 1, 4)
    checkpoint.save(model, tmp_path / "run")
    restored = checkpoint.load(tmp_path / "run")
    text = torch.randint(256, (1, 12))
    assert torch.equal(model(text).y, restored(text).y)
    steps(model, 4, 9)
    steps(restored, 4, 9)
    assert torch.equal(model(text).y, restored(text).y)
    first, second = (m.fast_attention.projection_matrix for m in model.modules() if isinstance(m, Performer))
    assert not torch.equal(first, second)


def test_both_ways_takes_no_state() -> None:
    layer = make()
    with pytest.raises(UnsupportedContext, match="whole sequence at once"):
        layer(torch.randn(1, 4, DIM, dtype=torch.float64), Context(causal=False), layer.init_state(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": 2}, "head_dim 2 makes 1 features, and with fewer than 2 all keys look alike; use head_dim 3"),
        ({"features": 1}, "greater than 1"),
        ({"kernel": "elu"}, "'softmax' or 'relu'"),
        ({"redraw_interval": 0}, "greater than 0"),
        ({"nb_features": 8}, "unknown key; did you mean 'features'?"),
    ],
)
def test_a_bad_setting_is_refused_with_a_remedy(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose({"dim": 64, "mixer": [{"name": "performer", **settings}], "layers": 1})
    assert message in str(caught.value)


def test_published_sizes_are_the_defaults() -> None:
    config = PerformerConfig()
    assert [config.width(dim) for dim in (16, 32, 64, 128, 256, 512, 768, 1024)] == [8, 8, 8, 16, 32, 64, 64, 64]
    assert config.count(768) == 266


def test_autocast_computes_features_in_float32() -> None:
    layer = make().float()
    x = 3 * torch.randn(2, 9, DIM)
    for causal in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, Context(causal=causal)).y
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x, Context(causal=causal)).y, atol=0.2, rtol=0.1)
