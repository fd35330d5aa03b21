"""Hybrids of real plugins: composed, trained a few steps, streamed, saved, loaded, and streamed on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from altx import checkpoint, registry
from altx.capabilities import Capabilities, RouterCapabilities
from altx.compose import compose
from altx.errors import CompositionError
from altx.generation import prefill
from altx.layer import StepInfo
from altx.model import Model
from altx.optim import optimizer_groups
from altx.registry import Component
from altx.testing import prove
from altx.testing.case import difference, state_difference


def default_capabilities(component: Component) -> Capabilities:
    found: Capabilities = component.load("capabilities")(component.load("config")())
    return found


EVERY = [c.name for c in registry.default().components("mixer")]
MIXERS = [c.name for c in registry.default().components("mixer") if default_capabilities(c).causal]
ENCODERS = [name for name in EVERY if name not in MIXERS]
FEED_FORWARDS = [
    c.name for c in registry.default().components("feed-forward") if default_capabilities(c).growth != "none"
]
ATTACH = ["residual", "gate", "controller"]
PAIRS = [{"mixer": f"{a},{b}"} for a, b in itertools.combinations_with_replacement(MIXERS, 2)]
MEMORIES = [{"mixer": m, "memory": "ntm", "attach": a, "layers": 1} for m in MIXERS for a in ATTACH]
OTHERS = [
    {"mixer": "attention", "memory": component.name, "attach": attach, "layers": 1}
    for component in registry.default().components("memory")
    if component.name != "ntm"
    for attach in component.spec.attach
]
ROUTED = [{"mixer": m, "router": "topk", "feed_forward": "4*swiglu", "layers": 1} for m in MIXERS]


def over(router: Component, mixer: str) -> dict[str, Any]:
    """A mixer and a router over experts; or, if it can choose nothing else, over the depths of both."""
    able = default_capabilities(router)
    if not (isinstance(able, RouterCapabilities) and able.stepwise):
        return {"mixer": mixer, "router": router.name, "feed_forward": "4*swiglu", "layers": 1}
    stack = {"depths": 2, "sublayers": [{"mixer": mixer}, {"feed_forward": "swiglu"}]}
    return {"blocks": [{"sublayers": [{"router": router.name, "targets": [stack]}]}]}


ROUTERS = [
    over(component, mixer)
    for component in registry.default().components("router")
    if component.name != "topk" and default_capabilities(component).decode != "forbid"
    for mixer in ("attention", "mamba", "gated-deltanet")
]
STATEFUL = [{"mixer": "attention", "feed_forward": name, "layers": 2} for name in FEED_FORWARDS]
EVERYTHING = [
    {
        "mixer": ",".join(MIXERS),
        "memory": ",".join(["ntm", "none"][i % 2] for i in range(len(MIXERS))),
        "router": ",".join(["none", "topk"][i % 2] for i in range(len(MIXERS))),
        "feed_forward": "4*swiglu",
    }
]
TARGETS = [
    {"mixer": name} for name in MIXERS if not default_capabilities(registry.default().get("mixer", name)).provides
]
CHOICE = [{"blocks": [{"sublayers": [{"router": {"name": "topk", "k": 1, "renormalise": False}, "targets": TARGETS}]}]}]


def label(data: dict[str, Any]) -> str:
    return (
        "-".join(str(data[key]) for key in ("mixer", "memory", "attach", "router", "feed_forward") if key in data)
        or "mixers-by-router"
    )


@pytest.mark.parametrize(
    "data", [*PAIRS, *MEMORIES, *OTHERS, *ROUTED, *ROUTERS, *STATEFUL, *EVERYTHING, *CHOICE], ids=label
)
def test_a_hybrid_trains_streams_and_is_restored(data: dict[str, Any], tmp_path: Path) -> None:
    model = compose({"dim": 32, **data}, {"ntm.slots": 16} if "ntm" in data.get("memory", "") else {}, seed=0)
    first, last = train(model)
    assert last < first
    model = model.double().eval()
    text = torch.randint(256, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(text).y
        logits, state = prefill(model, text[:, :9], model.init_state(2))
        assert difference(logits, whole[:, 8]) < 1e-10
        checkpoint.save(model, tmp_path / "run")
        restored = checkpoint.load(tmp_path / "run").eval()
        for t in range(9, 14):
            out, again = model(text[:, t : t + 1], state=state), restored(text[:, t : t + 1], state=state)
            assert difference(out.y[:, 0], whole[:, t]) < 1e-10
            assert torch.equal(out.y, again.y)
            assert state_difference(out.state, again.state) == 0
            state = out.state


def train(model: Model, steps: int = 4) -> tuple[float, float]:
    """A few steps on one batch: the loss before and after."""
    text = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=3e-3, weight_decay=0.1))
    weights, found = model.loss_weights(), []
    for step in range(steps):
        out = model(text[:, :-1])
        loss = torch.nn.functional.cross_entropy(out.y.flatten(0, 1), text[:, 1:].flatten())
        assert set(out.losses) == set(weights)
        total = loss + sum(weights[name] * value for name, value in out.losses.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        model.on_step(StepInfo(step + 1, out.metrics))
        found.append(float(loss.detach()))
    return found[0], found[-1]


@pytest.mark.parametrize("attach", ATTACH)
def test_a_hybrid_of_everything_is_proved(attach: str) -> None:
    data = {"mixer": ",".join(MIXERS), "memory": "ntm", "attach": attach, "router": "topk", "feed_forward": "4*swiglu"}
    results = prove(compose({"dim": 32, **data}, {"ntm.slots": 8, "ntm.width": 4}, seed=0))
    assert [result for result in results if result.status != "passed"] == []


@pytest.mark.parametrize("mixer", EVERY)
def test_expert_choice_works_in_an_encoder(mixer: str) -> None:
    head = {"kind": "classifier", "classes": 4}
    model = compose({"mixer": mixer, "router": "expert-choice", "causal": False, "head": head, "dim": 32}, seed=0)
    results = prove(model)
    assert [result for result in results if result.status == "failed"] == []
    assert next(r for r in results if r.check == "padding").status == "passed"


@pytest.mark.parametrize("a, b", [(a, b) for a in ENCODERS for b in EVERY])
def test_a_mixer_that_looks_both_ways_goes_with_every_other_in_an_encoder(a: str, b: str, tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=f"(?s){a}.*causal: false"):
        compose({"mixer": f"{a},{b}", "dim": 32})
    head = {"kind": "classifier", "classes": 4}
    model = compose({"mixer": f"{a},{b}", "causal": False, "head": head, "dim": 32}, seed=0)
    text, labels = torch.randint(256, (8, 12), generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    optimizer, found = torch.optim.AdamW(optimizer_groups(model, lr=3e-3, weight_decay=0.1)), []
    for step in range(4):
        loss = torch.nn.functional.cross_entropy(model(text).y, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.on_step(StepInfo(step + 1, {}))
        found.append(float(loss.detach()))
    assert found[-1] < found[0]
    checkpoint.save(model.eval(), tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "run")(text).y, model(text).y)
