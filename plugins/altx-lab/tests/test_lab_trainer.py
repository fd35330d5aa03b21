"""The trainer: what a step does, and that a restored one goes on exactly."""

from __future__ import annotations

import math

import pytest
import torch
from altx_lab import text
from altx_lab.settings import Settings, rate
from altx_lab.trainer import MOMENTS, SCALARS, Diverged, Trainer, require_byte_model
from torch.nn import functional as F

from altx import checkpoint
from altx.compose import compose
from altx.config import ModelConfig, validate
from altx.errors import CheckpointError, ConfigError

SMALL = Settings(steps=8, batch=2, length=12, warmup=2, lr=1e-2)


@pytest.fixture
def make(toys, write_model, prose):
    def trainer(settings: Settings = SMALL, **toy) -> Trainer:
        model = compose(write_model(toy=toy), seed=0, plugins=toys)
        return Trainer(model, text.load(prose), settings)

    return trainer


def test_the_rate_warms_up_and_falls_to_a_tenth():
    settings = Settings(steps=100, warmup=9)
    rates = [rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 91)) / 2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_step_minimises_cross_entropy_plus_weighted_losses(make):
    trainer = make()
    windows = text.batch(trainer.text, size=2, length=12, seed=0, step=0)
    out = trainer.model(windows[:, :-1])
    cross_entropy = F.cross_entropy(out.y.transpose(1, 2), windows[:, 1:])
    ((name, size),) = out.losses.items()
    record = trainer.train_step()
    assert record["bits_per_byte"] == pytest.approx(cross_entropy.item() / math.log(2))
    assert record["loss"] == pytest.approx((cross_entropy + 0.01 * size).item())
    assert record["losses"] == {name: pytest.approx(size.item())}
    assert list(record["metrics"].values()) == [[3.0, 1.0]]


def test_each_group_keeps_its_own_rate_under_the_schedule(make):
    trainer = make()
    for _ in range(3):
        trainer.train_step()
    by_name = {name: group["lr"] for group in trainer.optimizer.param_groups for name in group["names"]}
    decay = next(lr for name, lr in by_name.items() if name.endswith("decay"))
    assert decay == pytest.approx(0.5 * rate(2, SMALL))
    assert by_name["input.weight"] == pytest.approx(1e-2 * rate(2, SMALL))


def test_components_are_told_of_each_step(make):
    trainer = make()
    for _ in range(3):
        trainer.train_step()
    steps = [buffer.item() for name, buffer in trainer.model.named_buffers() if name.endswith("steps")]
    assert steps == [3]


def test_a_restored_trainer_goes_on_exactly_and_leaves_the_global_generator_alone(make, toys, tmp_path):
    straight = make(noise=0.1)
    expected = [straight.train_step() for _ in range(8)]
    first = make(noise=0.1)
    before = [first.train_step() for _ in range(5)]
    checkpoint.save(first.model, tmp_path / "saved", extra=first.files())
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    second = Trainer(checkpoint.load(tmp_path / "saved", plugins=toys), first.text, SMALL)
    second.restore({name: (tmp_path / "saved" / name).read_bytes() for name in (MOMENTS, SCALARS)})
    after = [second.train_step() for _ in range(3)]
    assert before + after == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])


def test_parameters_that_never_had_a_gradient_keep_no_state(make):
    trainer = make()
    frozen = next(p for name, p in trainer.model.named_parameters() if name.endswith("decay"))
    frozen.requires_grad_(False)
    trainer.train_step()
    other = make()
    other.restore(trainer.files())
    assert other.step == 1 and len(other.optimizer.state) == len(list(trainer.model.parameters())) - 1


@pytest.mark.parametrize("name", [MOMENTS, SCALARS])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_trainer_state_is_refused(make, name, keep):
    trainer = make()
    trainer.train_step()
    files = trainer.files()
    files[name] = files[name][: int(keep * (len(files[name]) - 1))]
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        make().restore(files)


def test_the_state_of_another_model_is_refused(make, write_model, prose):
    trainer = make()
    trainer.train_step()
    other = Trainer(compose(write_model(dim=24)), text.load(prose), SMALL)
    with pytest.raises(CheckpointError, match="fits nothing"):
        other.restore(trainer.files())


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt(make):
    trainer = make(nan_after=2)
    trainer.train_step()
    trainer.train_step()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(Diverged, match="step 3: the loss is not a finite number"):
        trainer.train_step()
    assert trainer.step == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"input": {"kind": "tokens", "vocab": 100}}, "this model reads 100 tokens"),
        ({"input": {"kind": "vectors", "size": 3}, "head": {"kind": "classifier", "classes": 2}}, "reads vectors"),
        ({"head": {"kind": "classifier", "classes": 2}}, "has a classifier head"),
        ({"causal": False}, "sees later bytes"),
    ],
)
def test_only_a_causal_language_model_over_bytes_is_trained(top, message):
    blocks = [{"sublayers": [{"feed_forward": "mlp"}]}]
    with pytest.raises(ConfigError, match=message):
        require_byte_model(validate(ModelConfig, {"blocks": blocks, **top}))
    require_byte_model(validate(ModelConfig, {"blocks": blocks}))


def test_training_learns(make):
    trainer = make(Settings(steps=60, batch=8, length=32, warmup=5, lr=1e-2))
    records = [trainer.train_step() for _ in range(60)]
    assert records[0]["bits_per_byte"] == pytest.approx(8, abs=0.3)
    assert records[-1]["bits_per_byte"] < 4
