"""Every memory with every kind of mixer in every way: the laws hold for it, or it is refused with the reason.

Memories are those installed, so that one of a stranger is covered, too. The mixers stand for the three kinds that there
are: one that keeps every token, one with a state per channel, one with a matrix of associations.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from altx import registry
from altx.capabilities import Capabilities, MemoryCapabilities
from altx.compose import compose
from altx.config import ComponentRef
from altx.errors import AltxError, CompositionError
from altx.layer import Layer
from altx.registry import Component
from altx.resolve import resolve_part
from altx.spec import ATTACH_MODES, MemorySpec
from altx.testing import run
from altx.testing.case import Case, difference
from altx.testing.runner import of_model

DIM = 16
SMALL = 4
MIXERS = ("attention", "mamba", "gated-deltanet")
MEMORIES = {c.qualified: c for c in registry.default().components("memory")}
LAWS = (
    "causality", "splits", "steps", "padding", "reset", "packing", "select", "save-restore", "statistics", "gradients",
    "gradcheck",
)  # fmt: skip

ENCODED = ("rows", "padding", "packing", "gradients")


def small(component: Component) -> dict[str, Any]:
    """Settings of a memory with every whole number at 4, if that is accepted: a dozen tokens are several chunks."""
    found: dict[str, Any] = {}
    for name, value in component.load("config")():
        if isinstance(value, int) and not isinstance(value, bool) and value > SMALL:
            try:
                ref = ComponentRef.model_validate({"name": component.qualified, **found, name: SMALL})
                resolve_part(registry.default(), "memory", ref, "", DIM)
            except AltxError:
                continue
            found[name] = SMALL
    return found


SETTINGS = {name: small(component) for name, component in MEMORIES.items()}


def can(component: Component, **settings: Any) -> Capabilities:
    found: Capabilities = component.load("capabilities")(component.load("config")(**settings))
    return found


def reason(memory: Component, mode: str, mixer: str) -> str | None:
    """What a refusal has to say, or None for what has to work: the design's table of attach modes."""
    spec, holds, hears = memory.spec, can(memory), can(registry.default().get("mixer", mixer))
    assert isinstance(spec, MemorySpec) and isinstance(holds, MemoryCapabilities)
    if mode not in spec.attach:
        return f"does not attach as '{mode}'.*it attaches as {', '.join(spec.attach)}"
    lacking = {
        "kv": not hears.accepts_kv and f"{mode}: .*{mixer}.*takes no keys and values.*accepts_kv",
        "context": not hears.cross and f"{mode}: .*{mixer}.*does not attend across.*declares cross",
        "controller": not holds.steps and f"{mode}: .*cannot be fed one token at a time.*residual or gate",
    }
    return lacking.get(mode) or None


WAIVED = {
    ("altx-knn:knn", "gradcheck"): "no gradient flows into stored keys and values (arXiv:2203.08913, section 3.2)",
}
"""Laws that a memory is known to break, with the reason; one that holds after all is an error."""

CASES = [(name, mode, mixer) for name in MEMORIES for mode in ATTACH_MODES for mixer in MIXERS]
LEGAL = [case for case in CASES if reason(MEMORIES[case[0]], *case[1:]) is None]
ILLEGAL = [case for case in CASES if case not in LEGAL]


def config(memory: str, mode: str, mixer: str) -> dict[str, Any]:
    return {
        "dim": DIM, "layers": 1, "mixer": mixer, "memory": {"name": memory, **SETTINGS[memory]}, "attach": mode,
        "input": {"kind": "tokens", "vocab": 11}, "feed_forward": {"name": "altx:swiglu", "hidden": 8},
    }  # fmt: skip


def test_every_memory_is_met_in_each_of_its_ways() -> None:
    assert {"ntm", "dnc", "titans", "knn"} <= {component.name for component in MEMORIES.values()}
    for name, component in MEMORIES.items():
        assert isinstance(component.spec, MemorySpec)
        assert {mode for memory, mode, _ in LEGAL if memory == name} >= set(component.spec.attach)
        # Chunks that no law's dozen tokens would fill leave the laws nothing to break.
        settled = can(component, **SETTINGS[name])
        assert isinstance(settled, MemoryCapabilities) and settled.chunk <= SMALL


@pytest.mark.parametrize("memory, mode, mixer", LEGAL)
def test_the_laws_hold(memory: str, mode: str, mixer: str) -> None:
    model = compose(config(memory, mode, mixer), seed=0)
    subject = of_model(model)
    results = {result.check: result for result in run(subject, LAWS)}
    waived = {law for name, law in WAIVED if name == memory}
    broken = {r.check: (r.message, r.example) for r in results.values() if r.status != "passed"}
    assert broken.keys() == waived, broken
    assert results.keys() >= set(LAWS)
    assert all(r.value is None or r.value <= 1e-10 for r in results.values() if r.check != "gradcheck")
    assert _through_states(Case(subject)) < 1e-10


def _through_states(case: Case) -> float:
    """How far the gradients of a sequence in several calls are from those of one call."""
    layer: Layer = copy.deepcopy(case.layer).train()
    x = case.inputs(2, 11)

    def gradients(lengths: list[int]) -> list[Tensor]:
        layer.zero_grad()
        state, outputs = case.state(2, layer=layer), []
        for piece in x.split(lengths, 1):
            out = layer(piece, case.ctx, state)
            state = out.state
            outputs.append(out.y)
        y = torch.cat(outputs, 1)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]

    return max(difference(*pair) for pair in zip(gradients([3, 1, 5, 2]), gradients([11]), strict=True))


@pytest.mark.parametrize("memory, mode, mixer", LEGAL)
def test_the_laws_hold_in_an_encoder(memory: str, mode: str, mixer: str) -> None:
    head = {"kind": "vectors", "size": 3}
    model = compose({**config(memory, mode, mixer), "causal": False, "head": head}, seed=0)
    results = {result.check: result for result in run(of_model(model), ENCODED)}
    assert {r.check: (r.message, r.example) for r in results.values() if r.status == "failed"} == {}
    assert all(results[law].status == "passed" for law in ENCODED)


@pytest.mark.parametrize("memory, mode, mixer", ILLEGAL)
def test_what_cannot_be_is_refused_with_the_reason(memory: str, mode: str, mixer: str) -> None:
    component = MEMORIES[memory]
    with pytest.raises(CompositionError) as refusal:
        compose(config(memory, mode, mixer))
    said = str(refusal.value)
    wanted = reason(component, mode, mixer)
    assert wanted and re.search(wanted, said, re.DOTALL), said
    assert component.name in said and "attach" in said
