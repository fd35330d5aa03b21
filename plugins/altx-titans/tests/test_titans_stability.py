"""Titans' memory keeps its numbers, and its gradients, small at every length: the steps of its own descent are bounded.

Without the bounds of the defaults each of these grows by powers of ten, or ends in NaN.
"""

import pytest
import torch
from altx_titans.config import TitansConfig
from altx_titans.titans import Titans
from torch import nn

UNBOUNDED = {"max_lr": 1.0, "max_grad_norm": None, "norm_eps": 1e-5, "dampening": False, "decay_bias": -4.0}


def scanned(config, dim, tokens, *, lasting=None, kinds=64):
    """The largest weight, and the gradient's norm by the tokens, of a scan over tokens of so many kinds."""
    torch.manual_seed(0)
    memory = Titans(TitansConfig(**config), dim)
    if lasting is not None:
        nn.init.constant_(memory.to_momentum[0].bias, lasting)
    x = torch.randn(kinds, dim)[torch.randint(kinds, (1, tokens))].requires_grad_()
    found = memory.scan(x, memory.init_state(1))
    found.read.value.square().sum().backward()
    return max(found.state[name].abs().max().item() for name in memory.names), x.grad.norm().item()


@pytest.mark.parametrize("config", [{}, {"heads": 1}, {"depth": 1}, {"residual_norm": False}])
@pytest.mark.parametrize("lasting", [None, 3.0], ids=["momentum as it starts", "momentum 0.95"])
def test_a_long_sequence_stays_bounded(config, lasting):
    weight, gradient = scanned(config, 64, 512, lasting=lasting)
    assert weight < 5
    assert gradient < 1e3


def test_what_the_bounds_are_for():
    weight, gradient = scanned(UNBOUNDED, 64, 512)
    assert not (weight < 1e6 and gradient < 1e9)


@pytest.mark.parametrize("momentum", [-3.0, 0.0, 3.0, 6.0])
@torch.no_grad()
def test_a_chunk_of_equal_keys_moves_a_matrix_to_its_value_and_not_beyond(momentum):
    """With max_lr auto the error never grows, whatever the momentum; with six times as much it explodes."""

    def errors(scale):
        torch.manual_seed(0)
        config = TitansConfig(heads=1, depth=1, residual_norm=False, decay_bias=-50.0, max_grad_norm=None)
        memory = Titans(config, 16).double()
        memory.max_lr *= scale
        memory.to_queries.load_state_dict(memory.to_keys.state_dict())
        for linear, bias in ((memory.to_adaptive_step, 50.0), (memory.to_momentum, momentum)):
            nn.init.constant_(linear[0].bias, bias)
            nn.init.zeros_(linear[0].weight)
        x = torch.randn(1, 1, 16, dtype=torch.float64)
        state, found = memory.init_state(1, dtype=torch.float64), []
        target = memory.to_values(x)
        for _ in range(60):
            found.append((memory.read(x, state)[0].value - target).norm().item())
            state = memory.write(x.expand(1, 16, 16), state)[0]
        return found

    found = errors(1.0)
    assert max(found) <= found[0]
    assert found[-1] < 0.5 * found[0]
    assert max(errors(6.0)) > 5 * found[0]


@torch.no_grad()
def test_no_token_moves_a_weight_further_than_its_step_times_the_bound():
    config = TitansConfig(heads=2, max_lr=0.5, max_grad_norm=0.25, decay_bias=-50.0, chunk=4)
    torch.manual_seed(0)
    memory = Titans(config, 16).double()
    nn.init.zeros_(memory.to_decay_factor[0].weight)
    state = memory.init_state(1, dtype=torch.float64)
    for _ in range(40):
        before = state
        state = memory.write(100 * torch.randn(1, 1, 16, dtype=torch.float64), before)[0]
        for name in memory.names:
            assert (state[name] - before[name]).flatten(2).norm(dim=-1).max() <= 0.5 * 0.25 + 1e-12
