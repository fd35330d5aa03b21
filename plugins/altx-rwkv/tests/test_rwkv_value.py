"""RWKV-7's first value: exported by the first such layer of a model wherever it stands, and read by those after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from altx_rwkv.rwkv7 import RWKV7
from torch import nn

from altx import checkpoint
from altx.adapters import PrefixReplay
from altx.compose import compose
from altx.context import Context
from altx.layer import Layer
from altx.testing import prove
from altx.testing.case import agitate, difference

MODELS: dict[str, dict[str, Any]] = {
    "alone": {"mixer": "3*rwkv7"},
    "hybrid": {"mixer": "rwkv4,rwkv7,rwkv5,2*rwkv7"},
    "repeats": {"blocks": [{"repeat": 2, "sublayers": [{"mixer": {"name": "rwkv4"}}, {"mixer": {"name": "rwkv7"}}]}]},
    "experts": {"mixer": "2*rwkv7", "router": "topk", "feed_forward": "2*rwkv7-channel"},
    "target": {
        "blocks": [
            {"sublayers": [{"mixer": {"name": "rwkv7"}}]},
            {
                "sublayers": [
                    {
                        "router": {"name": "topk", "k": 1, "renormalise": False},
                        "targets": [{"mixer": {"name": "rwkv7"}}, {"mixer": {"name": "rwkv4"}}],
                    }
                ]
            },
        ]
    },
}


def made(data: dict[str, Any], seed: int = 0) -> nn.Module:
    return agitate(compose({"dim": 16, **data}, seed=seed).double()).eval()


def layers(model: nn.Module) -> list[RWKV7]:
    return [layer for layer in model.modules() if isinstance(layer, RWKV7)]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_every_law_whatever_the_value_passes(name: str) -> None:
    if "topk" in str(MODELS[name]):
        pytest.importorskip("altx_moe")
    model = compose({"dim": 16, **MODELS[name]}, seed=0)
    assert [result for result in prove(model) if result.status == "failed"] == []


@pytest.mark.parametrize("name", MODELS)
def test_only_the_first_exports_and_only_the_others_have_a_residual(name: str, tmp_path: Any) -> None:
    if "topk" in str(MODELS[name]):
        pytest.importorskip("altx_moe")
    model = made(MODELS[name])
    first, *others = layers(model)
    assert first.capabilities.provides == {"v_first"} and not hasattr(first, "v0")
    for layer in others:
        assert layer.capabilities.requires == {"v_first"} and layer.v0.shape == (1, 1, 16)
    tokens = torch.randint(256, (2, 9))
    with torch.no_grad():
        before = model(tokens).y
        # The value is all that the others see of this weight, once the first layer's own output is cut off.
        first.output.weight.zero_()
        cut = model(tokens).y
        first.value.weight.mul_(1.1)
        assert difference(model(tokens).y, cut) > 1e-6 and difference(before, cut) > 1e-6
        checkpoint.save(model, tmp_path / "run")
        assert torch.equal(checkpoint.load(tmp_path / "run")(tokens).y, model(tokens).y)


def test_a_target_of_a_router_with_none_before_it_does_neither() -> None:
    pytest.importorskip("altx_moe")
    router = {"router": {"name": "topk", "k": 1, "renormalise": False}, "targets": [{"mixer": {"name": "rwkv7"}}] * 2}
    model = made({"blocks": [{"sublayers": [router]}, {"sublayers": [{"mixer": {"name": "rwkv7"}}]}]})
    assert [hasattr(layer, "v0") for layer in layers(model)] == [False, False, False]
    assert [sorted(layer.capabilities.provides) for layer in layers(model)] == [[], [], ["v_first"]]
    assert [result for result in prove(model) if result.status == "failed"] == []


@pytest.mark.parametrize("attach", ["residual", "gate", "controller"])
def test_it_passes_memories(attach: str) -> None:
    pytest.importorskip("altx_ntm")
    data = {"mixer": "2*rwkv7", "memory": "ntm", "attach": attach}
    model = compose({"dim": 16, **data}, {"ntm.slots": 8, "ntm.width": 4}, seed=0)
    assert [hasattr(layer, "v0") for layer in layers(model)] == [False, True]
    assert [result for result in prove(model) if result.status == "failed"] == []


def test_padding_anywhere_changes_neither_the_value_nor_what_is_made_of_it() -> None:
    first, second = layers(made({"mixer": "2*rwkv7"}))
    x, mask = torch.randn(2, 12, 16, dtype=torch.float64), torch.rand(2, 12) > 0.4
    ctx = Context(mask=mask)
    with torch.no_grad():
        out = first(x, ctx)
        # Whatever others left at masked tokens stays there.
        value = out.exports["v_first"].masked_fill(~mask[..., None], torch.nan)
        found = second(x, ctx.replace(shared={"v_first": value})).y
        for row in range(2):
            real = x[row : row + 1, mask[row]]
            alone = first(real)
            assert difference(alone.exports["v_first"], value[row : row + 1, mask[row]]) < 1e-12
            expected = second(real, Context(shared=alone.exports)).y
            assert difference(expected, found[row : row + 1, mask[row]]) < 1e-12


def test_it_passes_a_replay_of_the_prefix() -> None:
    first, _ = layers(made({"mixer": "2*rwkv7"}))
    replayed: Layer = PrefixReplay(copy.deepcopy(first), 16)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        whole, state, values = first(x).exports["v_first"], replayed.init_state(2), []
        for t in range(7):
            out = replayed(x[:, t : t + 1], state=state)
            values.append(out.exports["v_first"])
            state = out.state
    assert difference(torch.cat(values, 1), whole) < 1e-12


def test_long_sequences_in_pieces_share_every_token() -> None:
    model = made({"mixer": "2*rwkv7", "feed_forward": "rwkv7-channel"})
    tokens = torch.randint(256, (3, 1500))
    whole = model(tokens).y.detach()  # gradients keep it in one piece
    with torch.no_grad():
        assert difference(model(tokens).y, whole) < 1e-9
        assert model(tokens[:, :0]).y.shape[1] == 0


def test_an_encoder_shares_it_in_both_directions() -> None:
    head = {"kind": "classifier", "classes": 3}
    model = compose({"dim": 16, "mixer": "2*rwkv7", "causal": False, "head": head}, seed=0)
    assert [hasattr(layer, "v0") for layer in layers(model)] == [False, False, True, True]
    assert [result for result in prove(model) if result.status == "failed"] == []
