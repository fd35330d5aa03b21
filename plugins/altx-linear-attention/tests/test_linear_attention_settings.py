"""How the linear recurrences start, what of them decays, and which settings are refused."""

from __future__ import annotations

import pytest
import torch
from altx_linear_attention.retnet_config import RetNetConfig

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.layer import Layer
from altx.optim import optimizer_groups
from altx.resolve import resolve

DIM = 12


def make(name: str, dim: int = DIM, layer: int = 1, layers: int = 3, seed: int = 0, **config) -> Layer:
    torch.manual_seed(seed)
    blueprint = resolve(
        validate(ModelConfig, {"dim": dim, "blocks": [{"sublayers": [{"mixer": {"name": name, **config}}]}]}),
        registry.default(),
    )
    return build_branch(blueprint.blocks[0][0], BuildContext(dim=dim, layer=layer, num_layers=layers))


def test_the_first_block_of_hgrn2_has_no_lower_bound_and_the_others_start_where_the_shared_parameter_would():
    assert make("hgrn2", layer=0, expand_ratio=4).lower_bounds is None
    layer = make("hgrn2", layer=2, layers=4, expand_ratio=4)
    k, g = layer._gates(torch.full((1, 1, DIM), -50.0))
    torch.testing.assert_close(g.exp(), torch.full_like(g, 2 / 4))
    torch.testing.assert_close(k, torch.full_like(k, 2 / 4))


@pytest.mark.parametrize(
    ("name", "config", "bounds"),
    [
        ("retnet", {"expand_v": 2.0}, {"q_proj": 2**-2.5, "v_proj": 2**-2.5, "g_proj": 2**-2.5, "out_proj": 0.5}),
        ("gla", {}, {"q_proj": 2**-2.5, "k_proj": 2**-2.5, "gk_proj.0": 2**-2.5, "gk_proj.1": 2**-2.5}),
    ],
)
def test_weights_start_xavier_uniform_with_the_published_gain(name, config, bounds):
    layer = make(name, dim=64, **config)
    for part, gain in bounds.items():
        weight = layer.get_submodule(part).weight
        assert weight.abs().max().item() == pytest.approx(gain * (6 / sum(weight.shape)) ** 0.5, rel=0.02)


def test_other_weights_start_as_published():
    layer = make("mlstm", dim=256, layers=4)
    assert torch.equal(layer.igate_preact.bias, torch.full((8,), -10.0))
    torch.testing.assert_close(layer.fgate_preact.bias, torch.linspace(3, 6, 8))
    assert not any(part.weight.any() for part in (layer.igate_preact, layer.fgate_preact, layer.ogate_preact))
    assert layer.q.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.05)
    assert layer.out_proj.weight.std().item() == pytest.approx(2 / 4 / 256**0.5, rel=0.05)
    layer = make("mlstm", dim=256, layers=4, block="pre-up")
    assert not any(gate.weight.any() for gate in (layer.mlstm_cell.igate, layer.mlstm_cell.fgate))
    torch.testing.assert_close(layer.mlstm_cell.fgate.bias, torch.linspace(3, 6, 4))
    for part in (layer.proj_up, layer.q_proj, layer.k_proj, layer.v_proj):
        assert part.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.05)
    assert layer.proj_down.weight.std().item() == pytest.approx(2 / 4 / 256**0.5, rel=0.05)
    for name in ("lightning", "hgrn2"):
        weights = {n: p for n, p in make(name, dim=256).named_parameters() if n.endswith("proj.weight")}
        assert all(p.std().item() == pytest.approx(0.02, rel=0.05) for p in weights.values()) and weights


def test_lower_bounds_norms_and_biases_do_not_decay():
    layer = make("hgrn2", expand_ratio=4, short_conv=True)
    groups = optimizer_groups(layer, lr=1e-3, weight_decay=0.1)
    free = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert free == {"lower_bounds", "g_norm.weight"}


@pytest.mark.parametrize(("dim", "heads"), [(16, 2), (32, 2), (64, 2), (512, 2), (768, 3), (2048, 8), (250, 5)])
def test_retention_has_heads_of_256_channels_where_they_fit(dim, heads):
    config = RetNetConfig()
    config.fit(dim)
    assert config.count(dim) == heads


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("linear-attention", {"heads": 5}, "use heads 4 or 6, or dim 15"),
        ("retnet", {"heads": 4}, "a multiple of 2 channels; use heads 3 or 6, or dim 16"),
        ("lightning", {"heads": 5}, "use heads 4 or 6"),
        ("gla", {"expand_k": 0.3}, "use expand_k 0.333333 for 4"),
        ("gla", {"heads": 4}, "use heads 3 or 6"),
        ("hgrn2", {"expand_ratio": 5}, "use expand_ratio 4 or 6, or dim 15"),
        ("mlstm", {"heads": 5}, "use heads 3 or 6"),
        (
            "mlstm",
            {"block": "pre-up", "heads": 5},
            "the inner width 64 is not divisible into 5 equal heads; use heads 4",
        ),
        ("mlstm", {"block": "pre-up", "qkv_block": 5}, "use qkv_block 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would_do(name, config, message):
    with pytest.raises(Exception, match=message):
        make(name, **config)
