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
        (64, {"windw": 8}, "windw"),
    ],
)
def test_a_bad_setting_is_refused_with_a_remedy(dim: int, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose({"dim": dim, "mixer": [{"name": "attention", **settings}], "layers": 1})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("dim", "settings"),
    [(250, {"heads": 5}), (250, {"heads": 8, "head_dim": 32}), (12, {"heads": 4, "rotary": False}), (64, {"heads": 8})],
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
    layer = build(AttentionConfig(heads=4, bias=True), BuildContext(dim=128, num_layers=8))
    for name, parameter in layer.named_parameters():
        std = 0.0 if name.endswith("bias") else 0.02 / 4 if name == "o_proj.weight" else 0.02
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name


def test_describing_it_needs_no_torch() -> None:
    code = "import altx_attention.plugin, altx_attention.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
