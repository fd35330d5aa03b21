"""Mixture of recursions begins with all depths for all tokens: the authors' warm-ups of capacity and of balance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from altx.compose import compose
from altx.context import Context
from altx.errors import CompositionError
from altx.layer import StepInfo
from altx.model import Model
from altx.recursion import Recursion

DIM, DEPTHS, STEPS = 16, 3, 8


def composed(causal: bool = True, **router: Any) -> tuple[Model, Recursion]:
    head = {} if causal else {"head": {"kind": "vectors", "size": 3}}
    targets = [{"depths": DEPTHS, "sublayers": [{"mixer": "attention"}]}]
    blocks = [{"sublayers": [{"router": {"name": "mixture-of-recursions", **router}, "targets": targets}]}]
    model = compose({"dim": DIM, "causal": causal, "blocks": blocks, **head}, seed=0)
    layer = next(module for module in model.modules() if isinstance(module, Recursion))
    return model, layer


def tokens(length: int = 60) -> torch.Tensor:
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("step", [0, 1, 4, 7, 8, 100])
def test_shares_fall_from_all_tokens_to_the_capacity(step: int) -> None:
    model, layer = composed(capacity=[1.0, 0.5, 0.25], capacity_warmup_steps=STEPS)
    model.on_step(StepInfo(step))
    rest = (1 + math.cos(math.pi * min(1, step / STEPS))) / 2
    wanted, left = [], 60
    for before, capacity in ((1, 1), (1, 0.5), (0.5, 0.25)):
        left = math.ceil(left * (capacity + (1 - capacity) * rest) / (before + (1 - before) * rest) - 1e-9)
        wanted.append(2 * left)
    assert layer.train()(tokens()).metrics["active"].tolist() == wanted
    assert (wanted == [120] * 3) == (step == 0) and (wanted == [120, 60, 30]) == (step >= STEPS)


def test_an_encoder_that_is_not_in_training_has_its_capacity_at_once() -> None:
    _, layer = composed(causal=False, capacity=[1.0, 0.5, 0.25], capacity_warmup_steps=STEPS)
    assert layer.eval()(tokens(), Context(causal=False)).metrics["active"].tolist() == [120, 60, 30]


def test_a_masked_row_warms_up_by_its_own_tokens() -> None:
    _, layer = composed(capacity=[1.0, 0.5, 0.25], capacity_warmup_steps=STEPS)
    mask = torch.arange(60) < torch.tensor([[0], [7]])
    assert layer.train()(tokens(), Context(mask=mask)).metrics["active"].tolist() == [7, 7, 7]


def test_every_token_goes_to_the_last_depth_before_any_is_balanced() -> None:
    _, layer = composed(choice="token", bias_rate=0.01, balance_warmup_steps=STEPS)
    torch.nn.init.normal_(layer.router.gate.weight)
    x, load = tokens().requires_grad_(), {"load": torch.tensor([0.0, 0.0, 120.0])}
    probs = torch.softmax(x @ layer.router.gate.weight.T, -1)
    for step in range(1, STEPS + 2):
        out = layer.train()(x)
        router = layer.router
        early = step <= STEPS
        assert (out.metrics["router.load"].tolist() == [0, 0, 120]) == early
        assert router.bias.any() == (step > STEPS + 1)
        if step == 1:
            # The balance loss is of what was chosen, and the weight is what the gate gives the last depth.
            torch.testing.assert_close(out.losses["router.balance"], 3 * probs[..., 2].mean())
            (gradient,) = torch.autograd.grad(out.y.sum(), layer.router.gate.weight)
            assert gradient.abs().sum() > 0
        router.on_step(StepInfo(step, load))
        assert bool(router.bias.any()) == (step > STEPS)
    assert layer.router.bias.tolist() == pytest.approx([0.01, 0.01, -0.01])


def test_targets_that_are_no_depths_know_no_last_one() -> None:
    targets = [{"feed_forward": "swiglu", "repeat": 3}]
    router = {"name": "mixture-of-recursions", "choice": "token", "balance_warmup_steps": STEPS}
    model = compose({"dim": DIM, "blocks": [{"sublayers": [{"router": router, "targets": targets}]}]}, seed=0)
    with pytest.raises(
        CompositionError, match=r"balance_warmup_steps sends every token to the last depth, and .*experts"
    ):
        model(torch.zeros(1, 2, dtype=torch.int64))


def test_after_training_a_token_has_the_depth_of_its_own() -> None:
    _, layer = composed(choice="token", balance_warmup_steps=STEPS)
    torch.nn.init.normal_(layer.router.gate.weight)
    assert (layer.eval()(tokens()).metrics["router.load"] > 0).all()


@pytest.mark.parametrize("router", [{"capacity_warmup_steps": 8}, {"choice": "token", "balance_warmup_steps": 8}])
def test_a_checkpoint_knows_how_far_the_warm_up_is(router: dict[str, Any]) -> None:
    model, layer = composed(**router)
    model.on_step(StepInfo(5))
    again, _ = composed(**router)
    again.load_state_dict(model.state_dict())
    assert [value.item() for name, value in again.state_dict().items() if name.endswith("router.step")] == [5]
    assert layer.router.double().step.dtype == torch.int64
    plain, _ = composed(**{name: value for name, value in router.items() if name == "choice"})
    assert not any(name.endswith("router.step") for name in plain.state_dict())
