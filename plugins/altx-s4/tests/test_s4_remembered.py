"""Discretised coefficients are kept between steps of decoding, and never a moment too long."""

from __future__ import annotations

import copy

import pytest
import torch
from altx_s4.config import S4Config, S4DConfig, S5Config
from altx_s4.remembered import Remembered
from altx_s4.s4 import build as build_s4
from altx_s4.s4d import build as build_s4d
from altx_s4.s5 import build as build_s5

from altx.spec import BuildContext

KINDS = {"s4d": (S4DConfig, build_s4d), "s4": (S4Config, build_s4), "s5": (S5Config, build_s5)}


@pytest.fixture(params=KINDS)
def layer(request):
    config, build = KINDS[request.param]
    torch.manual_seed(0)
    return build(config(), BuildContext(dim=8))


def step(layer, dtype=torch.float32):
    x = torch.randn(1, 1, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    state = layer.init_state(1, dtype=dtype)
    for _ in range(3):
        out = layer(x, state=state)
        state = out.state
    return out.y


def test_it_is_computed_once_while_nothing_changes(layer, monkeypatch):
    calls = []
    compute = layer.remembered

    def counted(function, tensors):
        return compute(lambda: calls.append(0) or function(), tensors)

    monkeypatch.setattr(layer, "remembered", counted)
    with torch.no_grad():
        first = step(layer)
        assert len(calls) == 1 and torch.equal(step(layer), first) and len(calls) == 1
    step(layer).sum().backward()
    assert len(calls) == 4
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("how", ["no_grad", "data", "load", "replace"])
def test_any_change_of_any_parameter_is_noticed(layer, how):
    for name in dict(layer.named_parameters()):
        with torch.no_grad():
            before = step(layer)
            owner, _, short = name.rpartition(".")
            owner = layer.get_submodule(owner)
            parameter = getattr(owner, short)
            changed = parameter * 1.05 + 0.05
            if how == "no_grad":
                parameter.copy_(changed)
            elif how == "data":
                parameter.data.copy_(changed)
            elif how == "load":
                layer.load_state_dict(layer.state_dict() | {name: changed})
            else:
                setattr(owner, short, torch.nn.Parameter(changed))
            found = step(layer)
        assert not torch.equal(found, before), name
        torch.testing.assert_close(found, step(layer).detach())  # with gradients nothing is remembered


def test_another_dtype_is_another_result(layer):
    with torch.no_grad():
        step(layer)
        found = step(layer.double(), torch.float64)
    torch.testing.assert_close(found, step(layer, torch.float64).detach(), atol=1e-14, rtol=0)


def test_it_is_no_part_of_a_checkpoint_nor_shared_by_copies(layer):
    names = set(layer.state_dict())
    with torch.no_grad():
        before = step(layer)
        other = copy.deepcopy(layer)
        other.load_state_dict({name: value * 1.1 for name, value in other.state_dict().items()})
        assert not torch.equal(step(other), before) and torch.equal(step(layer), before)
    assert set(layer.state_dict()) == names == set(dict(layer.named_parameters()))


def test_nan_is_never_remembered():
    calls, bad = [], torch.tensor([float("nan")])
    remembered = Remembered[int]()
    with torch.no_grad():
        for _ in range(2):
            remembered(lambda: calls.append(0) or 1, [bad])
    assert len(calls) == 2


def test_where_torch_calls_are_watched_nothing_is_compared(layer):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad():
        before = step(layer)
        with FlopCounterMode(display=False):
            assert torch.equal(step(layer), before)
        x, states = torch.randn(3, 1, 1, 8), layer.init_state(1)
        mapped = torch.func.vmap(lambda one: layer(one, state=states).y)(x)
        torch.testing.assert_close(mapped, torch.stack([layer(one, state=states).y for one in x]))
