"""The numbers of the authors' code, which cannot be installed here, for the weights and inputs that `numbers` gives.

`upstream_values.safetensors` holds what these gave in float64, on a CPU, torch 2.13, parameters filled by `fill`:

* idiap/fast-transformers 2ad36b9: `AttentionLayer` around `LinearAttention` ("both-ways"), and its projections around
  `RecurrentLinearAttention`, token by token ("causal").
* microsoft/torchscale 4d1e0e8: `MultiScaleRetention` with `RetNetRelPos`, in its three forms, the buffers of the latter
  and the inside of `RMSNorm` in float64 too. With an epsilon only the recurrent form is a function of the past that can
  be streamed: the others divide by sums of absolute values as well, which cancels but for that epsilon.
* fla-org/flash-linear-attention bc3b101: `GatedLinearAttention` and `HGRN2Attention`, whose Triton kernels (recurrence,
  norms, convolutions) had plain PyTorch in their place.
* NX-AI/xlstm 032a6fb: `mLSTMLayer.step`, token by token, its `conv1d.conv` called `conv1d` when parameters were filled.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.context import Context
from altx.layer import Layer
from altx.resolve import resolve

VALUES = load_file(Path(__file__).with_name("upstream_values.safetensors"))


def numbers(*shape: int, phase: float) -> torch.Tensor:
    """Of mean 0 and variance 1, the same on every machine."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return ((i * i * 0.6180339887498949 + phase).frac() * 2 - 1).mul(3**0.5).reshape(shape)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    names = sorted(name for name, _ in module.named_parameters() if name != "lower_bounds")
    for index, name in enumerate(names):
        p = module.get_parameter(name)
        wave = numbers(*p.shape, phase=0.1 * (index + 1))
        p.copy_(wave * p.shape[-1] ** -0.5 if p.dim() > 1 else 1 + 0.3 * wave)


def make(name: str, dim: int, layer: int = 0, layers: int = 1, **config: object) -> Layer:
    blueprint = resolve(
        validate(ModelConfig, {"dim": dim, "blocks": [{"sublayers": [{"mixer": {"name": name, **config}}]}]}),
        registry.default(),
    )
    mixer = build_branch(blueprint.blocks[0][0], BuildContext(dim=dim, layer=layer, num_layers=layers)).double()
    fill(mixer)
    if layer and name == "hgrn2":
        with torch.no_grad():
            mixer.lower_bounds.copy_(numbers(layers, dim, phase=0.7))
    return mixer


CASES = {
    "idiap-16-2-elu-causal": ("linear-attention", {"heads": 2}),
    "idiap-24-3-elu-causal": ("linear-attention", {"heads": 3}),
    "idiap-24-4-relu-causal": ("linear-attention", {"heads": 4, "feature_map": "relu"}),
    "torchscale-16-2-32-1e-06-recurrent": ("retnet", {"heads": 2}),
    "torchscale-24-3-48-1e-06-recurrent": ("retnet", {"heads": 3}),
    "torchscale-24-3-24-1e-06-recurrent": ("retnet", {"heads": 3, "expand_v": 1.0}),
    "torchscale-16-2-32-0-parallel": ("retnet", {"heads": 2, "norm_eps": 1e-30}),
    "torchscale-16-2-32-0-chunks": ("retnet", {"heads": 2, "norm_eps": 1e-30}),
    "torchscale-16-2-32-0-recurrent": ("retnet", {"heads": 2, "norm_eps": 1e-30}),
    "gla-16-2-0": ("gla", {"heads": 2}),
    "gla-24-3-1": ("gla", {"heads": 3, "expand_k": 1.0, "expand_v": 2.0, "gate_normalizer": 4.0, "gate_rank": 5}),
    "gla-24-4-2": ("gla", {"heads": 4, "short_conv": True, "conv_bias": True, "gate_min": -0.05}),
    "gla-16-4-3": ("gla", {"heads": 4, "output_gate": False, "short_conv": True, "conv_kernel": 3}),
    "hgrn2-16-8-0": ("hgrn2", {"expand_ratio": 8}),
    "hgrn2-24-8-1": ("hgrn2", {"expand_ratio": 8}),
    "hgrn2-24-12-2": ("hgrn2", {"expand_ratio": 12, "short_conv": True}),
    "xlstm-16-0": ("mlstm", {"block": "pre-up"}),
    "xlstm-32-1": ("mlstm", {"block": "pre-up", "heads": 8, "qkv_block": 8, "bias": True}),
    "xlstm-24-2": ("mlstm", {"block": "pre-up", "heads": 2, "proj_factor": 1.3, "conv_kernel": 3}),
}


def case(key: str) -> tuple[Layer, torch.Tensor, torch.Tensor]:
    """Our layer, its input, and what upstream makes of it."""
    name, config = CASES[key.replace("both-ways", "causal")]
    expected = VALUES[key]
    place = {"layer": int(key.rsplit("-", 1)[1]), "layers": 3} if name == "hgrn2" else {}
    return make(name, expected.shape[2], **place, **config), numbers(*expected.shape, phase=0.05), expected


def test_every_value_is_compared():
    assert VALUES.keys() == CASES.keys() | {key.replace("causal", "both-ways") for key in CASES if "idiap" in key}


@pytest.mark.parametrize("key", CASES)
def test_the_mixer_gives_the_numbers_of_the_authors_code(key):
    mixer, x, expected = case(key)
    assert expected.std() > 0.5
    torch.testing.assert_close(mixer(x).y, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(mixer.float()(x.float()).y, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", CASES)
def test_token_by_token_too(key):
    mixer, x, expected = case(key)
    state, ys = mixer.init_state(len(x)), []
    for token in x.split(1, 1):
        out = mixer(token, state=state)
        state = out.state
        ys.append(out.y)
    torch.testing.assert_close(torch.cat(ys, 1), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("key", [key.replace("causal", "both-ways") for key in CASES if "idiap" in key])
def test_linear_attention_that_looks_both_ways_gives_the_numbers_of_the_authors_code(key):
    mixer, x, expected = case(key)
    ctx = Context(causal=False)
    torch.testing.assert_close(mixer(x, ctx).y, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(mixer.float()(x.float(), ctx).y, expected.float(), atol=1e-5, rtol=0)
