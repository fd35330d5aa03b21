"""The mixer computes the paper's equations, token by token, whatever is masked, reset or split."""

from __future__ import annotations

import math

import pytest
import torch
from altx_mamba.config import MambaConfig
from altx_mamba.mixer import build

from altx.context import Context
from altx.layer import Layer
from altx.optim import optimizer_groups
from altx.spec import BuildContext

DIM, ROWS, TOKENS = 12, 3, 41

FORMS = {
    "plain": {},
    "falcon": {"inner_norm_eps": 1e-6},
    "biases": {"bias": True, "conv_bias": False, "conv_kernel": 3, "dt_rank": 2, "expand": 3},
}


def make(seed=0, num_layers=1, dim=DIM, **config) -> Layer:
    torch.manual_seed(seed)
    return build(MambaConfig(**{"state_size": 4, **config}), BuildContext(dim=dim, num_layers=num_layers))


@pytest.fixture(params=FORMS)
def mixer(request) -> Layer:
    """In float64, with every parameter moved far from where it starts."""
    layer = make(**FORMS[request.param]).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
        layer.dt_proj.bias.add_(3)  # else the states hardly move
    return layer


@pytest.fixture
def x():
    return torch.randn(ROWS, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def holes():
    """Left, interior and right padding, and a row without a real token among the first ten."""
    mask = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0, :4] = mask[1, -5:] = mask[2, :10] = False
    return mask


@pytest.fixture
def resets():
    """Some next to each other, so that a tap could reach back across several."""
    reset = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.15
    reset[0, 6] = reset[1, 7] = reset[1, 8] = True
    return reset


def by_hand(layer, x_TD):
    """Algorithm 2 for one sequence of real tokens, one number at a time where the paper has a sum."""
    inner, width = layer.conv1d.weight.shape[0], layer.conv1d.weight.shape[2]
    rank, size = layer.dt_proj.weight.shape[1], layer.A_log.shape[1]
    A, past, h, ys = -layer.A_log.exp(), [x_TD.new_zeros(inner)] * (width - 1), x_TD.new_zeros(inner, size), []
    for x in x_TD:
        u, z = layer.in_proj(x)[:inner], layer.in_proj(x)[inner:]
        window = torch.stack([*past, u], 1)
        v = (window * layer.conv1d.weight[:, 0]).sum(1) + (0 if layer.conv1d.bias is None else layer.conv1d.bias)
        v = v * torch.sigmoid(v)
        low, B, C = layer.x_proj(v).split([rank, size, size])
        if layer.inner_norm_eps:
            low, B, C = (part / (part.square().mean() + layer.inner_norm_eps).sqrt() for part in (low, B, C))
        dt = torch.log1p(torch.exp(layer.dt_proj(low)))
        h = torch.exp(torch.outer(dt, torch.ones(size)) * A) * h + torch.outer(dt * v, B)
        ys.append(layer.out_proj((h @ C + layer.D * v) * z * torch.sigmoid(z)))
        past = [*past[1:], u]
    return torch.stack(ys) if ys else x_TD


def assert_rows_by_hand(layer, x, y, mask=None, reset=None):
    """y equals `by_hand` on the real tokens of each of its sequences."""
    for row in range(len(x)):
        real = torch.arange(x.shape[1]) if mask is None else mask[row].nonzero()[:, 0]
        starts = [] if reset is None else reset[row, real].nonzero()[:, 0].tolist()
        for piece in torch.tensor_split(real, starts):
            torch.testing.assert_close(y[row, piece], by_hand(layer, x[row, piece]), atol=1e-10, rtol=0)


def test_it_computes_the_papers_equations(mixer, x):
    assert_rows_by_hand(mixer, x, mixer(x).y)


def test_masked_tokens_count_as_absent_in_any_pattern(mixer, x, holes):
    x[~holes] = float("nan")
    assert_rows_by_hand(mixer, x, mixer(x, Context(mask=holes)).y, holes)


def test_a_reset_starts_a_fresh_sequence_masked_or_not(mixer, x, holes, resets):
    assert_rows_by_hand(mixer, x, mixer(x, Context(reset=resets)).y, None, resets)
    assert_rows_by_hand(mixer, x, mixer(x, Context(mask=holes, reset=resets)).y, holes, resets)


@pytest.mark.parametrize("split", [[1] * TOKENS, [20, 21], [33, 2, 1, 5], [0, 40, 0, 1]])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_any_split_gives_the_same_outputs_and_state(mixer, x, holes, resets, split, with_mask, with_reset):
    ctx = Context(mask=holes if with_mask else None, reset=resets if with_reset else None)
    whole = mixer(x, ctx, mixer.init_state(ROWS))
    state, start, ys = mixer.init_state(ROWS), 0, []
    for count in split:
        out = mixer(x[:, start : start + count], ctx.slice(start, start + count), state)
        state, start = out.state, start + count
        ys.append(out.y)
    real = holes if with_mask else torch.ones_like(holes)
    torch.testing.assert_close(torch.cat(ys, 1)[real], whole.y[real], atol=1e-10, rtol=0)
    torch.testing.assert_close(mixer(x, ctx).y[real], whole.y[real], atol=1e-10, rtol=0)
    for name, leaf in whole.state.flat().items():
        torch.testing.assert_close(state.flat()[name], leaf, atol=1e-10, rtol=0)
    assert state.seen.tolist() == (holes.sum(1).tolist() if with_mask else [TOKENS] * ROWS)


@pytest.mark.parametrize("count", [1, 7])
def test_masked_tokens_leave_the_state_exactly_as_it_was(mixer, x, count):
    state = mixer(x, state=mixer.init_state(ROWS)).state
    after = mixer(x[:, :count], Context(mask=torch.zeros(ROWS, count, dtype=torch.bool)), state).state
    assert all(torch.equal(after.flat()[name], leaf) for name, leaf in state.flat().items())


def test_a_state_does_not_keep_the_whole_input_alive(mixer, x):
    state = mixer(x[:1], state=mixer.init_state(1)).state
    assert state["conv"].untyped_storage().nbytes() == state["conv"].numel() * 8


def test_a_state_in_bfloat16_keeps_the_recurrence_in_float32():
    state = make().init_state(2, dtype=torch.bfloat16)
    assert (state["conv"].dtype, state["ssm"].dtype) == (torch.bfloat16, torch.float32)


def test_it_trains_under_autocast(x):
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.float(), state=layer.init_state(ROWS))
    (out.y.float().sum() + out.state["ssm"].sum()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(out.y.float(), layer(x.float()).y, atol=0.05, rtol=0.05)


def test_it_runs_on_the_meta_device_where_costs_are_counted():
    layer = make().to("meta")
    out = layer(torch.empty(2, 40, DIM, device="meta"), state=layer.init_state(2))
    assert out.y.shape == (2, 40, DIM) and out.state["ssm"].is_meta


def test_torch_compile_takes_its_training_whole():
    layer, x = make(), torch.randn(2, 5, DIM)
    layer(x).y.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).y.square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_torch_compile_takes_its_decoding_whole():
    layer, x = make(), torch.randn(2, 1, DIM)
    state = layer.init_state(2)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = layer(x, state=state)
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, state=state)
    torch.testing.assert_close(found.y, expected.y)
    torch.testing.assert_close(found.state["ssm"], expected.state["ssm"])
    assert not state["ssm"].any(), "the state passed in is written to"


def test_step_sizes_start_log_uniform_and_A_as_S4D_real():
    layer = make(dim=512, state_size=16, dt_min=0.002, dt_max=0.05)
    dt = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert 0.002 <= dt.min() < 0.0022 and 0.045 < dt.max() <= 0.0501
    assert dt.log().mean().item() == pytest.approx((math.log(0.002) + math.log(0.05)) / 2, abs=0.1)
    assert dt.log().std().item() == pytest.approx(math.log(25) / 12**0.5, rel=0.05)
    assert layer.dt_proj.weight.abs().max().item() == pytest.approx(32**-0.5, rel=1e-3)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(1024, 16))
    assert torch.equal(layer.D, torch.ones(1024))


def test_no_step_size_starts_below_the_floor():
    layer = make(dim=512, dt_min=1e-5, dt_max=0.1, dt_init_floor=0.01)
    assert torch.nn.functional.softplus(layer.dt_proj.bias).min().item() == pytest.approx(0.01, rel=1e-3)


def test_the_output_projection_starts_smaller_in_a_deeper_model():
    one, deep = make(), make(num_layers=16)
    torch.testing.assert_close(deep.out_proj.weight, one.out_proj.weight / 4)
    assert torch.equal(make(num_layers=16, rescale_out_proj=False).out_proj.weight, one.out_proj.weight)


def test_the_parameters_of_the_recurrence_do_not_decay():
    groups = optimizer_groups(make(bias=True), lr=1e-3, weight_decay=0.1)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert decayed == {"in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}


@pytest.mark.parametrize("settings", [{"dt_min": 1.0}, {"dt_rank": 0}, {"dt_rank": "full"}, {"state_size": 0}])
def test_a_wrong_setting_is_refused(settings):
    with pytest.raises(ValueError):
        MambaConfig(**settings)
