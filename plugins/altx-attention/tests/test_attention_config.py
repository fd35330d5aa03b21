"""A setting that cannot work is refused with what would."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from altx_attention.attention import build
from altx_attention.config import AttentionConfig, capabilities

from altx.compose import compose
from altx.errors import ConfigError
from altx.spec import BuildContext


@pytest.mark.parametrize(
    ("dim", "settings", "message"),
    [
        (250, {"heads": 8}, "dim 250 is not divisible by heads 8; use heads 5 or 25, or dim 256, or set head_dim"),
        (12, {"heads": 4}, "rotary needs an even head_dim, and dim 12 / heads 4 is 3; use heads 3 or 6, or dim 16"),
        (7, {"heads": 2}, "dim 7 is not divisible by heads 2; use dim 8, or set head_dim"),
        (64, {"heads": 6, "kv_heads": 2}, "use heads 4 or 8, or dim 72"),
        (64, {"heads": 8, "kv_heads": 3}, "kv_heads 3 does not divide heads 8; use kv_heads 1, 2, 4 or 8"),
        (64, {"head_dim": 5}, "rotary needs an even head_dim, not 5; use head_dim 6, or rotary false"),
        (64, {"window": 0}, "window"),
        (
            64,
            {"rotary_fraction": 0.3},
            "is 4.8 features, which turn in pairs; use rotary_fraction 0.25 or 0.375",
        ),
        (
            64,
            {"head_dim": 6, "rotary_fraction": 0.5},
            "is 3 features, which turn in pairs; use rotary_fraction 0.333333 or 0.666667",
        ),
        (64, {"rotary": False, "rotary_fraction": 0.5}, "of no use without rotary"),
        (64, {"softcap": 0}, "softcap"),
        (64, {"qk_norm": "layer"}, "qk_norm"),
        (64, {"windw": 8}, "windw"),
    ],
)
def test_a_bad_setting_is_refused_with_a_remedy(dim: int, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose({"dim": dim, "mixer": [{"name": "attention", **settings}], "layers": 1})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("dim", "settings"),
    [
        (250, {"heads": 5}),
        (250, {"heads": 8, "head_dim": 32}),
        (12, {"heads": 4, "rotary": False}),
        (64, {"heads": 8}),
        (64, {"rotary_fraction": 0.375}),
        (64, {"head_dim": 6, "rotary_fraction": 0.333333}),
    ],
)
def test_what_the_remedies_name_is_accepted(dim: int, settings: dict) -> None:
    model = compose({"dim": dim, "mixer": [{"name": "attention", **settings}], "layers": 1}, seed=0)
    assert model(torch.zeros(1, 3, dtype=torch.int64)).y.isfinite().all()


def test_a_window_bounds_the_state_and_forgoes_cropping() -> None:
    full, windowed = capabilities(AttentionConfig()), capabilities(AttentionConfig(window=8))
    assert (full.growth, full.rollback) == ("linear", "crop")
    assert (windowed.growth, windowed.rollback) == ("window", "snapshot")


def test_weights_start_as_in_gpt2() -> None:
    torch.manual_seed(0)
    layer = build(AttentionConfig(heads=4, bias=True, qk_norm="head"), BuildContext(dim=128, num_layers=8))
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
            continue
        std = 0.0 if name.endswith("bias") else 0.02 / 4 if name == "o_proj.weight" else 0.02
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize(
    ("settings", "biased"),
    [({"rotary": False}, False), ({}, True), ({"rotary": False, "sinks": True}, True)],
)
def test_keys_have_a_bias_where_softmax_does_not_cancel_it(settings: dict, biased: bool) -> None:
    layer = build(AttentionConfig(bias=True, **settings), BuildContext(dim=32))
    assert (layer.k_proj.bias is not None) == biased and layer.q_proj.bias is not None


def test_without_options_a_checkpoint_has_the_four_projections_alone() -> None:
    layer = build(AttentionConfig(), BuildContext(dim=32))
    assert list(layer.state_dict()) == [f"{name}_proj.weight" for name in "qkvo"]


def test_describing_it_needs_no_torch() -> None:
    modules = "altx_attention.plugin, altx_attention.config, altx_attention.mla_config"
    code = f"import {modules}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
