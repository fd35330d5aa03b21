"""With the weights of layers of transformers and linear-attention-transformer, and beside fla's naive loops: equal."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.context import Context
from altx.layer import Layer
from altx.resolve import resolve
from altx_kernels.linear_recurrence import linear_recurrence

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}


def make(name: str, dim: int, layer: int = 0, layers: int = 1, **config: object) -> Layer:
    blueprint = resolve(
        validate(ModelConfig, {"dim": dim, "blocks": [{"sublayers": [{"mixer": {"name": name, **config}}]}]}),
        registry.default(),
    )
    return build_branch(blueprint.blocks[0][0], BuildContext(dim=dim, layer=layer, num_layers=layers))


@torch.no_grad()
def move(layer: nn.Module) -> nn.Module:
    """Every parameter far from where it starts."""
    for parameter in layer.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.add_(torch.randn_like(parameter) * scale)
    return layer


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=TOLERANCE[expected.dtype] * max(1, float(expected.std())), rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("dim", "heads", "length"), [(24, 3, 5), (32, 4, 70), (48, 2, 1)])
def test_linear_attention_equals_linear_attention_transformer(dtype, dim, heads, length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("linear_attention_transformer.linear_attention_transformer")
    torch.manual_seed(0)
    peer = theirs.SelfAttention(dim, heads, causal=True).to(dtype)
    ours = make("linear-attention", dim, heads=heads, feature_map="exp", bias=False, eps=1e-12).to(dtype)
    names = {
        "query_projection": "to_q",
        "key_projection": "to_k",
        "value_projection": "to_v",
        "out_projection": "to_out",
    }
    weights = peer.state_dict()
    ours.load_state_dict({key: weights[f"{names[key.split('.')[0]]}.{key.split('.')[1]}"] for key in ours.state_dict()})
    x = torch.randn(2, length, dim, dtype=dtype)
    with torch.no_grad():
        close(ours(x).y, peer(x))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("dim", "heads", "length", "index"), [(32, 4, 70, 0), (24, 3, 17, 1), (32, 2, 1, 2)])
def test_lightning_equals_minimax(dtype, dim, heads, length, index):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        hidden_size=dim, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=3, block_size=16,
        head_dim=dim // heads,
    )  # fmt: skip
    theirs = modeling.MiniMaxLightningAttention(config, index)
    # Theirs computes decays and norm in float32 whatever the dtype.
    theirs.norm = nn.RMSNorm(dim, eps=theirs.norm.variance_epsilon)
    theirs = move(theirs).to(dtype)
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64)
    slopes = slopes[:, None, None] * (1 - index / (3 - 1 + 1e-5) + 1e-5)
    torch.testing.assert_close(slopes.float(), theirs.slope_rate.float(), atol=1e-7, rtol=0)
    theirs.slope_rate = slopes.to(dtype)
    theirs.query_decay, theirs.key_decay, theirs.diagonal_decay = (
        decay.to(dtype) for decay in theirs.decay_factors(slopes)
    )
    ours = make("lightning", dim, layer=index, layers=3, heads=heads, norm_eps=1e-6).to(dtype)
    ours.load_state_dict(dict(theirs.named_parameters()))
    x = torch.randn(2, length, dim, dtype=dtype)
    with torch.no_grad():
        close(ours(x).y, theirs(x, None, None)[0])


def xlstm_pair(dtype: torch.dtype, dim: int, heads: int, **config: float) -> tuple[nn.Module, Layer]:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    torch.manual_seed(0)
    settings = transformers.xLSTMConfig(
        hidden_size=dim,
        num_heads=heads,
        num_hidden_layers=2,
        norm_reduction_force_float32=False,
        chunk_size=16,
        **config,
    )
    theirs = move(modeling.xLSTMLayer(settings)).to(dtype)
    # Its config allows no float64 state.
    for kernel in ("mlstm_sequence_kernel", "mlstm_step_kernel"):
        theirs.mlstm_backend._inference_fn.keywords[kernel].keywords["dtype_state"] = dtype
    ours = make("mlstm", dim, layers=2, heads=heads, **config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("dim", "heads", "length", "config"),
    [(32, 4, 70, {}), (24, 3, 17, {"qk_dim_factor": 1.0, "gate_soft_cap": 3.0}), (32, 2, 1, {"v_dim_factor": 2.0})],
)
def test_mlstm_equals_transformers(dtype, dim, heads, length, config):
    theirs, ours = xlstm_pair(dtype, dim, heads, **config)
    x = 2 * torch.randn(2, length, dim, dtype=dtype)
    with torch.no_grad():
        expected, (c, n, m) = theirs(x)
        out = ours(x, state=ours.init_state(2))
    close(out.y, expected)
    close(out.state["cn"], torch.cat([c, n[..., None]], -1))
    torch.testing.assert_close(out.state["m"], m[..., 0], atol=1e-5, rtol=0)


def test_mlstm_continues_a_state_of_transformers():
    theirs, ours = xlstm_pair(torch.float64, 32, 4)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        _, (c, n, m) = theirs(x[:, :23])
        expected, _ = theirs(x[:, 23:], (c, n, m))
        state = ours.init_state(2).replace(cn=torch.cat([c, n[..., None]], -1), m=m[..., 0])
        found = ours(x[:, 23:], state=state).y
    close(found, expected)


def test_gradients_of_mlstm_equal_those_of_transformers_through_its_stabiliser():
    """Ours treats the stabiliser as a constant, which only the epsilon sees."""
    theirs, ours = xlstm_pair(torch.float64, 32, 4)
    x, by = torch.randn(2, 50, 32, dtype=torch.float64), torch.randn(2, 50, 32, dtype=torch.float64)
    (theirs(x)[0] * by).sum().backward()
    (ours(x).y * by).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-7 * scale, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "retention", "gla"])
@pytest.mark.parametrize(("length", "heads", "keys", "values"), [(1, 1, 3, 5), (20, 2, 8, 4), (70, 3, 16, 16)])
def test_the_recurrence_equals_the_naive_loops_of_fla(kind, length, heads, keys, values):
    """These compute in float32; the recurrences of all mixers here are one op, each with its own decay."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, length, heads, keys) for _ in range(2))
    v, g = torch.randn(2, length, heads, values), nn.functional.logsigmoid(torch.randn(2, length, heads, keys))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive = {
            "linear": pytest.importorskip("fla.ops.linear_attn.naive").naive_recurrent_linear_attn,
            "retention": pytest.importorskip("fla.ops.retention.naive").naive_retention,
            "gla": pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla,
        }[kind]
    if kind == "linear":
        expected, decay = naive(q, k, v)[0], None
    elif kind == "retention":
        expected = naive(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
        decay = torch.tensor([math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]).expand(2, length, -1)
    else:
        expected, decay = naive(q, k, v, g)[0], g
    found, _ = linear_recurrence(q * keys**-0.5, k, v, decay)
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def test_minimax_pads_on_the_left_as_we_mask():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=3, block_size=16, head_dim=8
    )
    theirs = move(modeling.MiniMaxLightningAttention(config, 1))
    ours = make("lightning", 32, layer=1, layers=3, heads=4)
    ours.load_state_dict(dict(theirs.named_parameters()))
    x, mask = torch.randn(2, 30, 32), (torch.arange(30) >= 7).expand(2, -1)
    with torch.no_grad():
        expected = theirs(x, None, mask)[0]
        found = ours(x, Context(mask=mask)).y
    close(found[:, 7:], expected[:, 7:])
