"""Every memory and every router where there is nothing to remember or to choose, and where numbers are none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from altx import registry
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError
from altx.layer import StepInfo
from altx.model import Model
from altx.testing.case import difference

SMALL: dict[str, dict[str, Any]] = {
    "associative-recurrent-memory": {"segment": 4, "tokens": 2},
    "compressive": {"segment": 4, "memory": 4, "compressed": 4},
    "infini": {"segment": 4},
    "knn": {"segment": 4, "k": 2},
    "memory-layer": {"keys": 4, "topk": 4},
    "mixture-of-depths": {"capacity": 0.5},
    "product-key": {"keys": 4, "topk": 4},
    "recurrent-memory": {"segment": 4, "tokens": 2},
    "token-turing": {"frame": 4},
    "titans": {"chunk": 4},
    "token-to-state": {"chunk": 3},
    "ttt": {"chunk": 4},
}
ENCODER = {"causal": False, "head": {"kind": "classifier", "classes": 3}}
EXPERTS = [{"feed_forward": "swiglu", "repeat": 3}]
DEPTHS = [{"depths": 3, "sublayers": [{"mixer": "mamba"}, {"feed_forward": "swiglu"}]}]
ROUTERS = [component.name for component in registry.default().components("router")]
MEMORIES = [component.name for component in registry.default().components("memory")]
OVER_THE_BATCH = ("base", "sinkhorn")
"""Routers that decide over all rows at once while training."""


def memory(name: str) -> Model:
    component = registry.default().get("memory", name)
    part = {"name": name, **SMALL.get(name, {})}
    if component.spec.attach[0] == "ffn":
        return compose({"dim": 16, "blocks": [{"sublayers": [{"mixer": "attention"}, {"memory": part}]}]}, seed=0)
    return compose({"dim": 16, "layers": 1, "mixer": "attention", "memory": [part]}, seed=0)


def router(name: str) -> Model:
    component = registry.default().get("router", name)
    can = component.load("capabilities")(component.load("config")())
    sublayer = {"router": {"name": name, **SMALL.get(name, {})}, "targets": DEPTHS if can.stepwise else EXPERTS}
    return compose({"dim": 16, "blocks": [{"sublayers": [sublayer]}], **({} if can.causal else ENCODER)}, seed=0)


MAKE = [*((memory, name) for name in MEMORIES), *((router, name) for name in ROUTERS)]
EACH = pytest.mark.parametrize(("make", "name"), MAKE, ids=[name for _, name in MAKE])


def not_finite(values: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in values.items() if not bool(value.double().isfinite().all())]


@EACH
@pytest.mark.parametrize("size", [(2, 6), (2, 0), (0, 6), (0, 0)], ids=str)
def test_where_there_is_nothing_nothing_changes(make, name, size: tuple[int, int]) -> None:
    model = make(name).double().train()
    tokens = torch.randint(256, size)
    ctx = Context(mask=torch.zeros(size, dtype=torch.bool))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = (
        [None] if model.capabilities.streaming == "none" else [None, model.init_state(size[0], dtype=torch.float64)]
    )
    for state in states:
        out = model(tokens, ctx, state)
        assert not_finite({"y": out.y, **out.losses, **out.metrics}) == []
        if state is not None:
            assert out.state is not None
            after = out.state.flat()
            assert [name for name, leaf in state.flat().items() if not torch.equal(leaf, after[name])] == []
        sum(out.losses.values(), start=out.y.sum()).backward()
        assert not_finite({name: p.grad for name, p in model.named_parameters() if p.grad is not None}) == []
        model.on_step(StepInfo(1, out.metrics))
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []


@EACH
def test_numbers_that_are_none_stay_in_their_row_and_out_of_what_is_kept(make, name: str) -> None:
    model = make(name).double().train(name in OVER_THE_BATCH)
    body, causal = model.body, model.config.causal
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    wild = x.clone()
    wild[0, 2] = math.nan
    ctx = Context(causal=causal, shared={"token_ids": torch.arange(18).view(3, 6)})
    if "token_ids" not in body.capabilities.requires:
        ctx = ctx.replace(shared={})
    out = body(wild, ctx)
    assert out.y[0, 2].isnan().all()
    if name in OVER_THE_BATCH:
        assert out.y[1:].isfinite().all()
    else:
        assert difference(out.y[1:], body(x, ctx).y[1:]) < 1e-12
    body.train()
    out = body(torch.full_like(x, math.nan), ctx)
    sum(out.losses.values(), start=out.y.sum()).backward()
    body.on_step(StepInfo(1, out.metrics))
    assert not_finite(model.state_dict()) == []


NOTHING = [[], [{"feed_forward": "swiglu", "repeat": 0}], [{"depths": 0, "sublayers": []}]]


@pytest.mark.parametrize("targets", NOTHING, ids=str)
def test_a_router_over_nothing_is_refused(targets: list[dict[str, Any]]) -> None:
    with pytest.raises(AltxError, match=r"blocks\[0\]\.sublayers\[0\].*(needs targets|or equal to 1, not 0)"):
        compose({"dim": 16, "blocks": [{"sublayers": [{"router": "topk", "targets": targets}]}]})
