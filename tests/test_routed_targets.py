"""Laws of every router over every kind of target, in float64."""

from __future__ import annotations

from typing import Any

import pytest
from altx_nsm.config import NSMConfig
from altx_nsm.memory import NSM

from altx import BuildContext, registry
from altx.attach import MemoryLayer
from altx.compose import compose
from altx.errors import CompositionError
from altx.testing.case import Subject
from altx.testing.runner import run

LAWS = (
    "steps", "empty", "select", "save-restore", "rows", "causality", "padding-across-calls", "padding", "all-masked",
    "statistics", "reset", "packing", "gradients",
)  # fmt: skip
TARGETS: dict[str, list[dict[str, Any]]] = {
    "experts": [{"feed_forward": {"name": "swiglu", "hidden": 8}, "repeat": 3}],
    "mixers": [{"mixer": "attention"}, {"mixer": "mamba"}, {"mixer": "gated-deltanet"}],
    "memories": [{"memory": {"name": "ntm", "slots": 6, "width": 4}, "repeat": 2}, {"memory": "nsm"}],
    "depths": [{"depths": 3, "sublayers": [{"mixer": "attention"}, {"mixer": "mamba"}, {"feed_forward": "swiglu"}]}],
}
SETTINGS: dict[str, dict[str, Any]] = {"mixture-of-depths": {"capacity": 0.5}, "token-to-state": {"chunk": 3}}
ROUTERS = [component.name for component in registry.default().components("router")]


def recipe(router: str, targets: list[dict[str, Any]], causal: bool) -> dict[str, Any]:
    sublayer = {"router": {"name": router, **SETTINGS.get(router, {})}, "targets": targets}
    head = {"head": {"kind": "classifier", "classes": 3}} if not causal else {}
    return {"dim": 16, "causal": causal, "blocks": [{"sublayers": [sublayer]}], **head}


def capabilities(router: str) -> Any:
    component = registry.default().get("router", router)
    return component.load("capabilities")(component.load("config")())


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_keeps_the_laws_over_every_kind_of_target(router: str, targets: str) -> None:
    can = capabilities(router)
    data = recipe(router, TARGETS[targets], can.causal)
    if can.mixes and targets != "experts":
        with pytest.raises(CompositionError, match="make feed-forwards its targets"):
            compose(data)
        return
    if can.stepwise and targets != "depths":
        with pytest.raises(CompositionError, match=r"no depths of one.*\n.*depths: 3"):
            compose(data)
        return
    model = compose(data, seed=0)
    results = run(Subject(f"{router} over {targets}", lambda: model, 16, can.causal), LAWS)
    assert [result for result in results if result.status == "failed"] == []
    assert {"rows", "padding", "gradients"} <= {result.check for result in results if result.status == "passed"}


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_that_decides_by_the_token_alone_routes_tokens_to_states(router: str) -> None:
    """The Neural State Machine's own choice replaced."""
    component, can = registry.default().get("router", router), capabilities(router)
    config = component.load("config")(**SETTINGS.get(router, {}))
    chooser = component.load("build")(config, BuildContext(dim=16, num_targets=5))
    chooser.capabilities = can
    states = NSMConfig(slots=5, chunk=3)
    if can.lookahead != "token" or can.requires:
        with pytest.raises(CompositionError, match="lookahead 'token'"):
            NSM(states, 16, chooser)
        return
    layer = MemoryLayer(NSM(states, 16, chooser))
    results = run(Subject(f"{router} over states", lambda: layer, 16), LAWS)
    assert [result for result in results if result.status == "failed"] == []
