"""With weights moved across, the delta mixers compute what transformers, flash-linear-attention and the papers do.

The code of others computes in float32 whatever it is given. To compare in float64 their modules see a torch whose
float32 is float64, and `Tensor.float` does nothing less.
"""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch
from altx_linear_attention import convert
from altx_linear_attention.delta import gated_delta_rule
from torch.nn import functional as F

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.resolve import resolve

DIM = 24
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
LENGTHS = (1, 3, 64, 71)


def mixer(name: str, dim: int = DIM, **config):
    """One layer, with its default settings but `config`."""
    blocks = [{"sublayers": [{"mixer": {"name": name, **config}}]}]
    blueprint = resolve(validate(ModelConfig, {"dim": dim, "blocks": blocks}), registry.default())
    return build_branch(blueprint.blocks[0][0], BuildContext(dim=dim))


class _Torch:
    """torch, but for the name of its float64."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def wide(monkeypatch):
    """Makes modules of other libraries compute in float64."""

    def widen(*modules):
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for module in modules:
            monkeypatch.setattr(module, "torch", _Torch())

    return widen


def modeling(monkeypatch, model: str):
    """A module of transformers with its own PyTorch code in place of kernels, which would be fla's, for GPUs."""
    pytest.importorskip("transformers")
    name = f"transformers.models.{model}.modeling_{model}"
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("fla", "causal_conv1d"):
            patch.setitem(sys.modules, package, None)
        module = importlib.import_module(name)
    for attribute, value in list(vars(module).items()):
        if hasattr(value, "__wrapped__") and value.__module__ == name:
            monkeypatch.setattr(module, attribute, value.__wrapped__)
    return module


def shaken(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module far from where it starts."""
    module = module.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.5 + ("norm" in name))
    return module


def check_equal(ours, theirs, dtype, lengths=LENGTHS):
    """Whole, and in pieces from a state."""
    for length in lengths:
        x = torch.randn(2, length, DIM, dtype=dtype)
        with torch.no_grad():
            expected, found = theirs(x), ours(x).y
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
        state, pieces = ours.init_state(2), []
        for piece in x.split([length // 3, length - length // 3 - 1, 1], 1):
            with torch.no_grad():
                out = ours(piece, state=state)
            state = out.state
            pieces.append(out.y)
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "value_heads"), [(2, 2), (2, 4), (3, 9)])
@pytest.mark.parametrize("model", ["qwen3_next", "qwen3_5", "olmo_hybrid"])
def test_gated_deltanet_equals_that_of_transformers(monkeypatch, wide, model, heads, value_heads, dtype):
    torch.manual_seed(0)
    module = modeling(monkeypatch, model)
    name = {"qwen3_next": "Qwen3Next", "qwen3_5": "Qwen3_5", "olmo_hybrid": "OlmoHybrid"}[model]
    text = "TextConfig" if model == "qwen3_5" else "Config"
    config = getattr(importlib.import_module(f"transformers.models.{model}"), name + text)(
        hidden_size=DIM, linear_num_key_heads=heads, linear_num_value_heads=value_heads, linear_key_head_dim=8,
        linear_value_head_dim=12, rms_norm_eps=1e-5, num_hidden_layers=2,
    )  # fmt: skip
    theirs = shaken(getattr(module, f"{name}GatedDeltaNet")(config, 0), dtype)
    ours = mixer(
        "gated-deltanet", heads=heads, value_heads=value_heads, head_dim=8, expand_v=1.5, norm_eps=1e-5,
        allow_neg_eigval=getattr(config, "linear_allow_neg_eigval", False),
    ).to(dtype)  # fmt: skip
    ours.load_state_dict(convert.gated_deltanet(theirs.state_dict(), heads=heads))
    if dtype == torch.float64:
        wide(module)
    check_equal(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_kda_equals_that_of_transformers(monkeypatch, wide, heads, dtype):
    torch.manual_seed(0)
    module = modeling(monkeypatch, "kimi_linear")
    config = importlib.import_module("transformers.models.kimi_linear").KimiLinearConfig(
        hidden_size=DIM, linear_num_heads=heads, linear_head_dim=8, rms_norm_eps=1e-5, num_hidden_layers=2
    )
    theirs = shaken(module.KimiLinearDeltaAttention(config, 0), dtype)
    ours = mixer("kda", heads=heads, head_dim=8, norm_eps=1e-5).to(dtype)
    ours.load_state_dict(convert.kda(theirs.state_dict()))
    if dtype == torch.float64:
        wide(module)
    check_equal(ours, theirs, dtype)


def naive(name: str):
    """fla's code in plain PyTorch, which runs on a CPU."""
    pytest.importorskip("fla")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"fla.ops.{name}.naive")


def arguments(batch, length, heads, group, width, values, per_key):
    q, k = (F.normalize(torch.randn(batch, length, heads, width, dtype=torch.float64), dim=-1) for _ in range(2))
    v = torch.randn(batch, length, heads * group, values, dtype=torch.float64)
    beta = torch.rand(batch, length, heads * group, dtype=torch.float64)
    decays = (batch, length, heads * group, *[width] * per_key)
    return q, k, v, beta, F.logsigmoid(torch.randn(decays, dtype=torch.float64) + 2)


@pytest.mark.parametrize("rule", ["delta_rule", "gated_delta_rule", "kda"])
def test_the_rule_equals_fla(wide, rule):
    torch.manual_seed(0)
    module = naive(rule)
    wide(module)
    for batch, length, heads, group, width, values in ((2, 5, 2, 1, 8, 6), (1, 70, 1, 3, 4, 9), (2, 33, 2, 2, 16, 16)):
        q, k, v, beta, g = arguments(batch, length, heads, group, width, values, rule == "kda")
        S = torch.randn(batch, heads * group, width, values, dtype=torch.float64)
        many_q, many_k = (x.repeat_interleave(group, 2) for x in (q, k))
        if rule == "delta_rule":
            g = None
            swapped = (x.transpose(1, 2) for x in (many_q, many_k, v, beta))
            expected, last = module.delta_rule_recurrence(*swapped, initial_state=S)
            expected = expected.transpose(1, 2)
        elif rule == "gated_delta_rule":
            expected, last = module.naive_recurrent_gated_delta_rule(
                many_q, many_k, v, beta, g, initial_state=S, output_final_state=True
            )
        else:
            expected, last = module.naive_recurrent_kda(q, k, v, g, beta, initial_state=S, output_final_state=True)
        o, found = gated_delta_rule(q * width**-0.5, k, v, beta, g, initial_state=S, reset=None)
        torch.testing.assert_close(o, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(found, last, atol=1e-12, rtol=0)


def by_the_paper(layer, x, decay, read_gate, most):
    """y (T, D) of x (T, D), token by token, from the equations: the delta rule of each head by itself."""
    w = {name: value.detach() for name, value in layer.state_dict().items()}

    def projected(name):
        z = x @ w[f"{name}_proj.weight"].T
        padded = torch.cat([z.new_zeros(3, z.shape[1]), z])
        taps = w[f"{name}_conv1d.weight"][:, 0]
        mixed = torch.stack([(padded[t : t + 4] * taps.T).sum(0) for t in range(len(x))])
        return mixed * torch.sigmoid(mixed)

    heads = w["b_proj.weight"].shape[0]
    q, k, v = (projected(name) for name in "qkv")
    keys, values = layer.head_dim, v.shape[1] // heads
    groups = heads // (k.shape[1] // keys)
    beta = most * torch.sigmoid(x @ w["b_proj.weight"].T)
    alpha = decay(w)
    read = []
    for h in range(heads):
        S = x.new_zeros(keys, values)
        of_key, of_value = (slice(i * n, (i + 1) * n) for i, n in ((h // groups, keys), (h, values)))
        rows = []
        for t in range(len(x)):
            q_t, k_t = (z[t, of_key] / torch.sqrt((z[t, of_key] ** 2).sum() + 1e-6) for z in (q, k))
            remembered = alpha[t, h].reshape(-1, 1) * S if alpha is not None else S
            recalled = k_t @ remembered
            S = remembered + beta[t, h] * torch.outer(k_t, v[t, of_value] - recalled)
            o = q_t @ S / keys**0.5
            rows.append(o / torch.sqrt((o**2).mean() + 1e-5) * w["o_norm.weight"])
        read.append(torch.stack(rows))
    return (torch.cat(read, 1) * read_gate(w)) @ w["o_proj.weight"].T


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_deltanet_is_what_the_paper_says(gate, negative):
    torch.manual_seed(0)
    layer = shaken(mixer("deltanet", output_gate=gate, allow_neg_eigval=negative, heads=3, expand_v=1.5), torch.float64)
    x = torch.randn(9, DIM, dtype=torch.float64)
    expected = by_the_paper(
        layer, x, lambda w: None, lambda w: F.silu(x @ w["g_proj.weight"].T) if gate else 1.0, 2 if negative else 1
    )
    torch.testing.assert_close(layer(x[None]).y[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_gated_deltanet_is_what_the_paper_says(gate, negative):
    torch.manual_seed(0)
    layer = shaken(
        mixer("gated-deltanet", output_gate=gate, allow_neg_eigval=negative, heads=2, value_heads=6, head_dim=6),
        torch.float64,
    )
    x = torch.randn(9, DIM, dtype=torch.float64)
    expected = by_the_paper(
        layer, x,
        lambda w: torch.exp(-torch.exp(w["A_log"]) * torch.log1p(torch.exp(x @ w["a_proj.weight"].T + w["dt_bias"]))),
        lambda w: F.silu(x @ w["g_proj.weight"].T) if gate else 1.0, 2 if negative else 1,
    )  # fmt: skip
    torch.testing.assert_close(layer(x[None]).y[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_kda_is_what_the_paper_says(bias):
    torch.manual_seed(0)
    layer = shaken(mixer("kda", heads=3, head_dim=6, gate_bias=bias), torch.float64)
    x = torch.randn(9, DIM, dtype=torch.float64)

    def decay(w):
        dt = torch.log1p(torch.exp(x @ w["f_a_proj.weight"].T @ w["f_b_proj.weight"].T + w["dt_bias"]))
        return torch.exp(-torch.exp(w["A_log"])[:, None] * dt.reshape(9, 3, 6))

    def gate(w):
        z = x @ w["g_a_proj.weight"].T @ w["g_b_proj.weight"].T
        return torch.sigmoid(z + w["g_b_proj.bias"] if bias else z)

    torch.testing.assert_close(layer(x[None]).y[0], by_the_paper(layer, x, decay, gate, 1), atol=1e-12, rtol=0)


CONVS = {f"{name}_conv1d.weight" for name in "qkv"}
COMMON = {f"{name}_proj.weight" for name in "qkvbo"} | CONVS | {"o_norm.weight"}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("deltanet", set()),
        ("gated-deltanet", {"a_proj.weight", "g_proj.weight", "A_log", "dt_bias"}),
        ("kda", {f"{part}_{half}_proj.weight" for part in "fg" for half in "ab"} | {"A_log", "dt_bias"}),
    ],
)
def test_parameters_have_the_published_names(name, more):
    assert set(mixer(name).state_dict()) == COMMON | more


def test_kda_takes_the_names_of_fla_and_the_shapes_of_kimi_linear():
    layer = shaken(mixer("kda", gate_bias=True), torch.float32)
    weights = layer.state_dict()
    theirs = {
        name.replace("_a_proj", "_proj.0").replace("_b_proj", "_proj.1"): weight for name, weight in weights.items()
    }
    theirs["A_log"] = weights["A_log"].reshape(1, 1, -1, 1)
    assert "f_proj.0.weight" in theirs and "g_proj.1.bias" in theirs
    back = convert.kda(theirs)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in back)
