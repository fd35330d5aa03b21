"""What the first layer of a kind exports, and the later ones read: wherever it stands, whatever is around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_plugin import Sharer

from altx import BuildContext, checkpoint, recipe
from altx.capabilities import Capabilities, meet, placed
from altx.compose import build, compose
from altx.layer import FRESH, Layer
from altx.measure import branch_layers, layer_costs
from altx.pieces import in_pieces
from altx.registry import Registry
from altx.resolve import resolve
from altx.testing import prove
from altx.testing.case import difference

MODELS: dict[str, dict[str, Any]] = {
    "repeats": {"mixer": "3*sharer"},
    "behind-others": {"mixer": "2*average,sharer,average,2*sharer"},
    "controller": {"mixer": "sharer,sharer", "memory": "notebook", "attach": "controller"},
    "residual": {"mixer": "2*sharer", "memory": "notebook", "attach": "residual"},
    "routed-experts": {"mixer": "2*sharer", "router": "router", "feed_forward": "2*swiglu"},
    "within-a-block": {"blocks": [{"repeat": 2, "sublayers": [{"mixer": {"name": "sharer"}}] * 2}]},
    "target": {
        "blocks": [
            {"sublayers": [{"router": "router", "targets": [{"mixer": "sharer", "repeat": 2}, {"mixer": "average"}]}]},
            {"repeat": 2, "sublayers": [{"mixer": "sharer"}]},
            {"sublayers": [{"router": "router", "targets": [{"mixer": "sharer"}, {"mixer": "average"}]}]},
        ]
    },
}


def sharers(model: torch.nn.Module) -> list[Sharer]:
    return [layer for layer in model.modules() if isinstance(layer, Sharer)]


@pytest.mark.parametrize("name", MODELS)
def test_the_first_exports_and_the_later_ones_read(toy: Registry, name: str, tmp_path: Any) -> None:
    model = compose({"dim": 16, **MODELS[name]}, seed=0, plugins=toy).eval()
    roles = [("export" if s.capabilities.provides else "read" if s.capabilities.requires else "alone", s.first)
             for s in sharers(model)]  # fmt: skip
    count = len(roles)
    if name == "target":
        assert roles == [("alone", True)] * 2 + [("export", True), ("read", False), ("read", False)]
    else:
        assert roles == [("export", True)] + [("read", False)] * (count - 1)
    assert not model.capabilities.requires and not model.capabilities.shares
    assert [r for r in prove(model) if r.status == "failed"] == []
    again = resolve(model.config, toy)
    assert again.config == model.config
    rebuilt = build(again).eval()
    rebuilt.load_state_dict(model.state_dict())
    tokens = torch.randint(256, (2, 9))
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens).y, model(tokens).y)
    checkpoint.save(model, tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "run", plugins=toy)(tokens).y, model(tokens).y)


def test_an_encoder_shares_in_each_direction(toy: Registry) -> None:
    model = compose({"dim": 16, "mixer": "2*sharer", "causal": False, "head": {"kind": "classifier", "classes": 3}},
                    seed=0, plugins=toy)  # fmt: skip
    assert [s.first for s in sharers(model)] == [True, True, False, False]
    assert [r for r in prove(model) if r.status == "failed"] == []


def test_exports_of_a_long_sequence_are_those_of_all_its_pieces() -> None:
    layer: Layer = Sharer(8, first=True).eval()
    x = torch.randn(3, 1500, 8)
    with torch.no_grad():
        out = in_pieces(layer, x, FRESH, None)
        assert out is not None
        assert torch.equal(out.exports["first_input"], x)
        assert difference(out.y, layer(x).y) < 1e-5


def test_layers_that_share_are_measured_one_by_one(toy: Registry) -> None:
    blueprint = resolve(recipe.load({"dim": 16, "mixer": "2*sharer", "feed_forward": "none"}), toy)
    shared: dict[str, torch.Tensor] = {}
    found = [
        layer_costs(layer, 16, 8, shared) for _, _, layer in branch_layers(build(blueprint, device="meta"), blueprint)
    ]
    assert found[0].flops_per_token < found[1].flops_per_token and shared["first_input"].shape == (1, 8, 16)


def test_a_shared_name_becomes_one_that_is_provided_or_required() -> None:
    both = Capabilities(shares=frozenset("ab"))
    assert placed(both, []) == Capabilities(provides=frozenset("ab"))
    assert placed(both, "ac") == Capabilities(provides=frozenset("b"), requires=frozenset("a"))
    assert placed(both, "a", target=True) == Capabilities(requires=frozenset("a"))
    assert meet([both, Capabilities()]).shares == both.shares


def test_what_components_have_in_common_is_of_one_model() -> None:
    first, second = BuildContext(dim=4), BuildContext(dim=4)
    replace(first, layer=3).common["key"] = "value"
    assert replace(first, layer=5).common == {"key": "value"}
    assert not second.common and first == second and hash(first) == hash(second)
