"""What the settings of the delta mixers mean, what they refuse, and how parameters start."""

from __future__ import annotations

import pytest
import torch
from altx_linear_attention import deltanet, gated_deltanet, kda
from altx_linear_attention.deltanet_config import DeltaNetConfig
from altx_linear_attention.gated_deltanet_config import GatedDeltaNetConfig
from altx_linear_attention.kda_config import KDAConfig

from altx import BuildContext

CASES = [
    (deltanet.build, DeltaNetConfig()),
    (gated_deltanet.build, GatedDeltaNetConfig()),
    (kda.build, KDAConfig()),
]


@pytest.mark.parametrize(
    ("config", "dim", "sizes"),
    [
        (DeltaNetConfig(), 2048, (16, 128, 128)),
        (DeltaNetConfig(), 768, (6, 128, 128)),
        (DeltaNetConfig(), 16, (2, 8, 8)),
        (DeltaNetConfig(heads=4, expand_k=0.5, expand_v=2), 64, (4, 8, 32)),
        (GatedDeltaNetConfig(), 2048, (6, 256, 6, 512)),
        (GatedDeltaNetConfig(), 1024, (3, 256, 3, 512)),
        (GatedDeltaNetConfig(), 768, (3, 192, 3, 384)),
        (GatedDeltaNetConfig(), 16, (2, 6, 2, 12)),
        (GatedDeltaNetConfig(heads=16, head_dim=128, value_heads=32, expand_v=1), 2048, (16, 128, 32, 128)),
        (KDAConfig(), 2048, (16, 128)),
        (KDAConfig(), 768, (6, 128)),
        (KDAConfig(), 16, (2, 8)),
        (KDAConfig(heads=32), 2304, (32, 128)),
    ],
)
def test_auto_is_the_published_size_or_what_fits(config, dim, sizes):
    assert config.sizes(dim) == sizes


@pytest.mark.parametrize(
    ("config", "dim", "message"),
    [
        (DeltaNetConfig(heads=5), 64, "64 is not divisible into 5 equal heads; use heads 4 or 8"),
        (DeltaNetConfig(expand_k=0.3), 64, "expand_k 0.3 times dim 64 is not a whole number of channels"),
        (
            GatedDeltaNetConfig(heads=4, value_heads=6),
            64,
            "6 value heads cannot be shared out to 4 key heads; .* 8",
        ),
        (GatedDeltaNetConfig(head_dim=5, expand_v=1.5), 64, "expand_v 1.5 times head_dim 5 is not a whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(config, dim, message):
    with pytest.raises(ValueError, match=message):
        config.fit(dim)


@pytest.mark.parametrize(("build", "config"), CASES)
def test_linear_maps_start_as_published(build, config):
    torch.manual_seed(0)
    layer = build(config, BuildContext(dim=256))
    for name in ("q_proj", "v_proj", "o_proj"):
        weight = getattr(layer, name).weight
        rows, columns = weight.shape
        xavier = 2**-2.5 * (2 / (rows + columns)) ** 0.5
        torch.testing.assert_close(weight.std().item(), 0.02 if build is kda.build else xavier, rtol=0.05, atol=0)
        assert (weight.abs().max() < 3**0.5 * xavier * 1.001) == (build is not kda.build)


@pytest.mark.parametrize(("build", "config"), CASES[1:])
def test_decays_start_as_published_and_have_no_weight_decay(build, config):
    torch.manual_seed(0)
    layer = build(config.model_copy(update={"heads": 64, "head_dim": 8}), BuildContext(dim=64))
    A, dt = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    least = 1 if build is kda.build else 0
    assert least <= A.min() < least + 1 and 14.5 < A.max() <= 16
    assert dt.min() * 1.0001 >= 0.001 and dt.max() <= 0.1 * 1.0001
    assert 0.4 < (dt < 0.01).float().mean() < 0.6  # log-uniform
    assert layer.param_groups() == {"A_log": {"weight_decay": 0.0}, "dt_bias": {"weight_decay": 0.0}}


@pytest.mark.parametrize(("build", "config"), CASES)
def test_nothing_of_the_state_grows(build, config):
    layer = build(config, BuildContext(dim=32))
    state = layer.init_state(2)
    before = {name: leaf.shape for name, leaf in state.leaves.items()}
    for _ in range(3):
        state = layer(torch.randn(2, 7, 32), state=state).state
    assert {name: leaf.shape for name, leaf in state.leaves.items()} == before
    assert state["delta"].dtype == torch.float32


@pytest.mark.parametrize(("build", "config"), CASES)
def test_half_precision_keeps_the_matrix_in_float32(build, config):
    layer = build(config, BuildContext(dim=32)).bfloat16()
    out = layer(torch.randn(2, 7, 32, dtype=torch.bfloat16), state=layer.init_state(2))
    assert out.y.dtype == torch.bfloat16 and out.state["delta"].dtype == torch.float32
    assert out.state["q_conv1d"].dtype == torch.bfloat16
