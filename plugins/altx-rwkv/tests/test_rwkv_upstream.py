"""The numbers of the authors' training code, which is no package, and the first values of its parameters.

`rwkv_upstream_values.safetensors` holds what these classes of BlinkDL/RWKV-LM 524481d gave in float64, on a CPU, torch
2.13, with n_layer 3 and 2, parameters filled by `fill` and inputs by `numbers`:

* RWKV-v4neo/src/model.py: `RWKV_TimeMix`, `RWKV_ChannelMix`;
* RWKV-v5/src/model.py: `RWKV_Tmix_x052`, `_x060`, `_x070`, `RWKV_CMix_x052`, `_x060`, `_x070`.

Their CUDA kernels had plain PyTorch in their place: for RWKV-4 the sums of the equation, not its recurrence; for
RWKV-5 and 6 the recurrence of the paper; for RWKV-7 the function `RWKV7_OP` of RWKV-v7/rwkv_v7_demo.py, in float64.

"y/NAME/D/LAYER" is what a layer returns, "first/NAME/D/LAYER/PARAMETER" what a parameter that is not random starts as.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from altx import BuildContext, registry
from altx.compose import build_part
from altx.config import ComponentRef
from altx.context import Context
from altx.layer import Layer
from altx.resolve import resolve_part

VALUES = load_file(Path(__file__).with_name("rwkv_upstream_values.safetensors"))
SIZES = {32: (2, 21, 8, 3), 48: (1, 37, 16, 2)}
"""By D: rows, tokens, width of a head, number of blocks."""

OUTPUTS = [tuple(name.split("/")[1:]) for name in VALUES if name.startswith("y/") and not name.endswith("v_first")]
FIRST = sorted({tuple(name.split("/")[1:4]) for name in VALUES if name.startswith("first/")})


def numbers(*shape: int, phase: float) -> torch.Tensor:
    """Of mean 0 and variance 1, the same on every machine."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return ((i * i * 0.6180339887498949 + phase).frac() * 2 - 1).mul(3**0.5).reshape(shape)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    for name, p in module.named_parameters():
        wave = numbers(*p.shape, phase=zlib.crc32(name.encode()) / 2**32)
        if p.squeeze().dim() > 1:
            p.copy_(wave * p.shape[-1] ** -0.5)
        else:
            p.copy_(wave - 2 if "decay" in name else 0.5 + 0.3 * wave)


def make(name: str, dim: int, layer: int) -> Layer:
    """A layer, which has earlier ones of its kind before it unless `layer` is 0."""
    _, _, width, layers = SIZES[dim]
    channel = name.endswith("-channel")
    config = {} if name == "rwkv7-channel" else {"hidden": 2 * dim} if channel else {"head_dim": width}
    if name == "rwkv4":
        config = {}
    kind = "feed-forward" if channel else "mixer"
    part = resolve_part(registry.default(), kind, ComponentRef(name=name, **config), "", dim)
    exported = frozenset({"v_first"}) if layer else frozenset()
    return build_part(part, BuildContext(dim=dim, layer=layer, num_layers=layers, exported=exported), Layer)


@pytest.mark.parametrize(("name", "dim", "layer"), OUTPUTS)
def test_outputs_equal_those_of_the_authors_code(name: str, dim: str, layer: str) -> None:
    size, index = int(dim), int(layer)
    module = make(name, size, index).double()
    fill(module)
    batch, length = SIZES[size][:2]
    x = numbers(batch, length, size, phase=0.25)
    ctx = Context(shared={"v_first": numbers(batch, length, size, phase=0.75)} if index else {})
    expected = VALUES[f"y/{name}/{dim}/{layer}"]
    assert expected.std() > 0.1
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        module, x = module.to(dtype), x.to(dtype)
        ctx = ctx.replace(shared={key: value.to(dtype) for key, value in ctx.shared.items()})
        with torch.no_grad():
            out = module(x, ctx)
            state, steps = module.init_state(batch, dtype=dtype), []
            for t in range(length):
                step = module(x[:, t : t + 1], ctx.slice(t, t + 1), state)
                steps.append(step.y)
                state = step.state
        for found in (out.y, torch.cat(steps, 1)):
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)
        for key, value in out.exports.items():
            assert index == 0
            torch.testing.assert_close(value.double(), VALUES[f"y/{name}/{dim}/{layer}/{key}"], atol=tolerance, rtol=0)


@pytest.mark.parametrize(("name", "dim", "layer"), FIRST)
def test_parameters_start_as_in_the_authors_code(name: str, dim: str, layer: str) -> None:
    module = make(name, int(dim), int(layer))
    prefix = f"first/{name}/{dim}/{layer}/"
    for key, expected in VALUES.items():
        if key.startswith(prefix):
            found = module.get_parameter(key.removeprefix(prefix)).squeeze().double()
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("version", [4, 5, 6, 7])
def test_matrices_start_as_the_authors_training_code_makes_them(version: int) -> None:
    time, channel = make(f"rwkv{version}", 32, 1), make(f"rwkv{version}-channel", 32, 1)
    scales = {"key": 0.0 if version == 4 else 0.1, "receptance": 0.0 if version == 4 else 1.0, "value": 1.0}
    scales |= {"output": 0.0} | ({"gate": 0.1} if version in (5, 6) else {})
    for name, scale in scales.items():
        weight = time.get_parameter(f"{name}.weight")
        torch.testing.assert_close(weight @ weight.T, scale**2 * torch.eye(32), atol=1e-5, rtol=0)
    key = channel.get_parameter("key.weight")
    gain = key.shape[0] / key.shape[1] if version == 4 else 1.0
    torch.testing.assert_close(key.T @ key, gain * torch.eye(32), atol=1e-5, rtol=0)
    assert not channel.get_parameter("value.weight").any()
    if version < 7:
        assert not channel.get_parameter("receptance.weight").any()
    if version > 4:
        # Of three blocks this is the second.
        torch.testing.assert_close(time.get_parameter("ln_x.weight"), torch.full((32,), (2 / 3) ** 0.7))
    if version == 6:
        for name in ("time_maa_w2", "time_decay_w2"):
            assert 0.009 < time.get_parameter(name).abs().max() <= 0.01
        assert not time.get_parameter("time_maa_w1").any() and not time.get_parameter("time_decay_w1").any()
    if version == 7:
        for name in "wavg":
            up = time.get_parameter(f"{name}2")
            assert not time.get_parameter(f"{name}1").any()
            torch.testing.assert_close(up @ up.T, 0.01 * torch.eye(32), atol=1e-6, rtol=0)
