"""The mixers mamba2 and mamba3 compute the papers' equations, token by token, whatever is masked or reset."""

from __future__ import annotations

import math

import pytest
import torch
from altx_mamba import mamba2, mamba3
from altx_mamba.mamba2_config import Mamba2Config
from altx_mamba.mamba3_config import Mamba3Config

from altx.context import Context
from altx.layer import Layer
from altx.optim import optimizer_groups
from altx.spec import BuildContext

DIM, ROWS, TOKENS = 12, 3, 41
SMALL = {"state_size": 8, "head_dim": 4}

FORMS = {
    "mamba2": ("mamba2", {}),
    "mamba2 groups": ("mamba2", {"n_groups": 2, "bias": True, "conv_bias": False, "conv_kernel": 3, "dt_lower": 0.3}),
    "mamba2 limits": ("mamba2", {"dt_upper": 0.7, "expand": 3}),
    "mamba3": ("mamba3", {}),
    "mamba3 groups": ("mamba3", {"n_groups": 2, "rope": "full", "decay": "heavy-tail"}),
    "mamba3 norm": ("mamba3", {"out_norm": True, "A_floor": 0.5}),
}


def make(name, seed=0, num_layers=1, dim=DIM, **config) -> Layer:
    torch.manual_seed(seed)
    build, kind = {"mamba2": (mamba2.build, Mamba2Config), "mamba3": (mamba3.build, Mamba3Config)}[name]
    return build(kind(**{**SMALL, **config}), BuildContext(dim=dim, num_layers=num_layers))


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture
def mixer(form) -> Layer:
    """In float64, with every parameter moved far from where it starts."""
    layer = make(form[0], **form[1]).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
        layer.dt_bias.add_(3)  # else the states hardly move
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
    """Some next to each other, so that something could reach back across several."""
    reset = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.15
    reset[0, 6] = reset[1, 7] = reset[1, 8] = True
    return reset


def rms(x, weight, groups=1):
    """Over each of the groups of x."""
    parts = [part / (part.square().mean() + 1e-5).sqrt() for part in x.chunk(groups)]
    return torch.cat(parts) * weight


def silu(x):
    return x * torch.sigmoid(x)


def mamba2_by_hand(layer, config, x_TD):
    """The block for one sequence of real tokens, head by head."""
    G, N, P, H, K = config.n_groups, config.state_size, config.head_dim, len(layer.D), config.conv_kernel
    E = H * P
    past = [x_TD.new_zeros(E + 2 * G * N)] * (K - 1)
    h, ys = [x_TD.new_zeros(N, P) for _ in range(H)], []
    for x in x_TD:
        z, u, dt = layer.in_proj(x).split([E, E + 2 * G * N, H])
        window = torch.stack([*past, u], 1)
        past = [*past[1:], u]
        u = silu((window * layer.conv1d.weight[:, 0]).sum(1) + (layer.conv1d.bias if config.conv_bias else 0))
        y = []
        for i in range(H):
            group = i // (H // G)
            v, B, C = u[i * P :][:P], u[E + group * N :][:N], u[E + (G + group) * N :][:N]
            step = torch.log1p(torch.exp(dt[i] + layer.dt_bias[i])).clamp(config.dt_lower, config.dt_upper)
            h[i] = torch.exp(-step * layer.A_log[i].exp()) * h[i] + step * torch.outer(B, v)
            y.append(C @ h[i] + layer.D[i] * v)
        ys.append(layer.out_proj(rms(torch.cat(y) * silu(z), layer.norm.weight, G)))
    return torch.stack(ys) if ys else x_TD


def mamba3_by_hand(layer, config, x_TD):
    """The block for one sequence of real tokens, head by head, with turns as products of complex numbers."""
    G, N, P, H, R = config.n_groups, config.state_size, config.head_dim, len(layer.D), config.angles
    E = H * P
    h, ys = [x_TD.new_zeros(N, P) for _ in range(H)], []
    turn = [torch.ones(R, dtype=torch.complex128) for _ in range(H)]
    earlier = [(x_TD.new_zeros(N), x_TD.new_zeros(P)) for _ in range(H)]

    def turned(part, by):
        pairs = torch.view_as_complex(part[: 2 * R].reshape(R, 2)) * by
        return torch.cat([torch.view_as_real(pairs).flatten(), part[2 * R :]])

    for x in x_TD:
        z, u, Bs, Cs, dt, a, mix, theta = layer.in_proj(x).split([E, E, G * N, G * N, H, H, H, R])
        y = []
        for i in range(H):
            group, v = i // (H // G), u[i * P :][:P]
            B = rms(Bs[group * N :][:N], layer.B_norm.weight) + layer.B_bias[i, 0]
            C = rms(Cs[group * N :][:N], layer.C_norm.weight) + layer.C_bias[i, 0]
            step = torch.log1p(torch.exp(dt[i] + layer.dt_bias[i]))
            rate = (
                torch.log1p(torch.exp(a[i])) if config.decay == "softplus" else 1 + a[i] if a[i] > 0 else 1 / (1 - a[i])
            )
            decay = torch.exp(-step * rate.clamp(min=config.A_floor))
            turn[i] = turn[i] * torch.exp(1j * step * math.pi * torch.tanh(theta))
            k, q, new = turned(B, turn[i]), turned(C, turn[i]), torch.sigmoid(mix[i])
            h[i] = decay * h[i] + (1 - new) * step * decay * torch.outer(*earlier[i]) + new * step * torch.outer(k, v)
            earlier[i] = (k, v)
            y.append(q @ h[i] + layer.D[i] * v)
        y = torch.cat(y)
        ys.append(layer.out_proj((rms(y, layer.norm.weight, H) if config.out_norm else y) * silu(z)))
    return torch.stack(ys) if ys else x_TD


@pytest.fixture
def by_hand(form, mixer):
    def run(x_TD):
        if form[0] == "mamba2":
            return mamba2_by_hand(mixer, Mamba2Config(**SMALL, **form[1]), x_TD)
        return mamba3_by_hand(mixer, Mamba3Config(**SMALL, **form[1]), x_TD)

    return run


def assert_rows_by_hand(by_hand, x, y, mask=None, reset=None):
    """y equals `by_hand` on the real tokens of each of its sequences."""
    for row in range(len(x)):
        real = torch.arange(x.shape[1]) if mask is None else mask[row].nonzero()[:, 0]
        starts = [] if reset is None else reset[row, real].nonzero()[:, 0].tolist()
        for piece in torch.tensor_split(real, starts):
            torch.testing.assert_close(y[row, piece], by_hand(x[row, piece]), atol=1e-10, rtol=1e-10)


def test_it_computes_the_papers_equations(mixer, by_hand, x):
    assert_rows_by_hand(by_hand, x, mixer(x).y)


def test_masked_tokens_count_as_absent_in_any_pattern(mixer, by_hand, x, holes):
    x[~holes] = float("nan")
    assert_rows_by_hand(by_hand, x, mixer(x, Context(mask=holes)).y, holes)


def test_a_reset_starts_a_fresh_sequence_masked_or_not(mixer, by_hand, x, holes, resets):
    assert_rows_by_hand(by_hand, x, mixer(x, Context(reset=resets)).y, None, resets)
    assert_rows_by_hand(by_hand, x, mixer(x, Context(mask=holes, reset=resets)).y, holes, resets)


@pytest.mark.parametrize("split", [[1] * TOKENS, [20, 21], [33, 2, 1, 5], [0, 40, 0, 1]])
@pytest.mark.parametrize("masked", [False, True])
def test_any_split_gives_the_same_outputs_and_state(mixer, x, holes, resets, split, masked):
    ctx = Context(mask=holes if masked else None, reset=resets if masked else None)
    whole = mixer(x, ctx, mixer.init_state(ROWS))
    state, start, ys = mixer.init_state(ROWS), 0, []
    for count in split:
        out = mixer(x[:, start : start + count], ctx.slice(start, start + count), state)
        state, start = out.state, start + count
        ys.append(out.y)
    real = holes if masked else torch.ones_like(holes)
    torch.testing.assert_close(torch.cat(ys, 1)[real], whole.y[real], atol=1e-10, rtol=1e-10)
    for name, leaf in whole.state.flat().items():
        torch.testing.assert_close(state.flat()[name], leaf, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("count", [1, 7])
def test_masked_tokens_leave_the_state_exactly_as_it_was(mixer, x, count):
    state = mixer(x, state=mixer.init_state(ROWS)).state
    after = mixer(x[:, :count], Context(mask=torch.zeros(ROWS, count, dtype=torch.bool)), state).state
    assert all(torch.equal(after.flat()[name], leaf) for name, leaf in state.flat().items())


def test_masked_nan_reaches_no_gradient(mixer, x, holes):
    x[~holes] = float("nan")
    mixer(x, Context(mask=holes)).y[holes].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


def test_a_state_does_not_keep_the_whole_input_alive(mixer, x):
    state = mixer(x[:1], state=mixer.init_state(1)).state
    assert all(leaf.untyped_storage().nbytes() == leaf.numel() * 8 for leaf in state.leaves.values())


def test_a_state_in_bfloat16_keeps_what_adds_up_in_float32():
    assert {n: v.dtype for n, v in make("mamba2").init_state(2, dtype=torch.bfloat16).leaves.items()} == {
        "conv": torch.bfloat16,
        "ssm": torch.float32,
    }
    leaves = make("mamba3").init_state(2, dtype=torch.bfloat16).leaves
    assert {name: value.dtype for name, value in leaves.items()} == dict.fromkeys(
        ("ssm", "angle", "k", "v"), torch.float32
    )


@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
@pytest.mark.parametrize("count", [1, 41])
def test_it_trains_under_autocast(name, count, x):
    layer = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x[:, :count].float(), state=layer.init_state(ROWS))
    (out.y.float().sum() + out.state["ssm"].sum()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(out.y.float(), layer(x[:, :count].float()).y, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
@pytest.mark.parametrize("count", [1, 40])
def test_it_runs_on_the_meta_device_where_costs_are_counted(name, count):
    layer = make(name).to("meta")
    ctx = Context(mask=torch.ones(2, count, dtype=torch.bool, device="meta"))
    out = layer(torch.empty(2, count, DIM, device="meta"), ctx, layer.init_state(2))
    assert out.y.shape == (2, count, DIM) and all(leaf.is_meta for leaf in out.state.leaves.values())


@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
@pytest.mark.parametrize("count", [1, 5])
def test_torch_compile_takes_its_training_whole(name, count):
    layer, x = make(name), torch.randn(2, count, DIM)
    state = layer.init_state(2)
    layer(x, state=state).y.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x, state=state).y.square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_parameters_have_the_names_and_shapes_of_the_authors_code():
    """For width 128 with 2 groups: mamba_ssm.modules.mamba2.Mamba2 and mamba3.Mamba3 with is_outproj_norm."""
    H, E, GN = 4, 256, 2 * 128
    mamba_2 = {
        "in_proj.weight": (2 * E + 2 * GN + H, 128), "conv1d.weight": (E + 2 * GN, 1, 4), "conv1d.bias": (E + 2 * GN,),
        "dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (E,), "out_proj.weight": (128, E),
    }  # fmt: skip
    mamba_3 = {
        "in_proj.weight": (2 * E + 2 * GN + 3 * H + 32, 128), "dt_bias": (H,), "B_bias": (H, 1, 128),
        "C_bias": (H, 1, 128), "B_norm.weight": (128,), "C_norm.weight": (128,), "D": (H,), "norm.weight": (E,),
        "out_proj.weight": (128, E),
    }  # fmt: skip
    ctx = BuildContext(dim=128)
    for layer, expected in (
        (mamba2.build(Mamba2Config(n_groups=2), ctx), mamba_2),
        (mamba3.build(Mamba3Config(n_groups=2, out_norm=True), ctx), mamba_3),
    ):
        assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == expected


@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
def test_step_sizes_start_log_uniform_and_none_below_the_floor(name):
    layer = make(name, dim=2048, dt_min=0.002, dt_max=0.05)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert 0.002 <= dt.min() < 0.0022 and 0.045 < dt.max() <= 0.0501
    assert dt.log().mean().item() == pytest.approx((math.log(0.002) + math.log(0.05)) / 2, abs=0.1)
    floored = torch.nn.functional.softplus(make(name, dim=2048, dt_min=1e-5, dt_init_floor=0.01).dt_bias)
    assert floored.min().item() == pytest.approx(0.01, rel=1e-3)


def test_the_rest_starts_as_in_the_authors_code():
    layer = make("mamba2", dim=2048, A_min=2.0, A_max=5.0)
    A = layer.A_log.exp()
    assert 2 <= A.min() < 2.05 and 4.95 < A.max() <= 5.001 and A.mean().item() == pytest.approx(3.5, abs=0.1)
    assert torch.equal(layer.D, torch.ones(1024)) and torch.equal(layer.norm.weight, torch.ones(4096))
    layer = make("mamba3", out_norm=True)
    for ones in (layer.D, layer.B_bias, layer.C_bias, layer.B_norm.weight, layer.C_norm.weight, layer.norm.weight):
        assert torch.equal(ones, torch.ones_like(ones))
    assert all(not part.bias.any() for part in (make("mamba2", bias=True).in_proj, make("mamba2", bias=True).out_proj))


@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
def test_the_output_projection_starts_smaller_in_a_deeper_model(name):
    one, deep = make(name), make(name, num_layers=16)
    torch.testing.assert_close(deep.out_proj.weight, one.out_proj.weight / 4)
    assert torch.equal(make(name, num_layers=16, rescale_out_proj=False).out_proj.weight, one.out_proj.weight)


def test_the_parameters_of_the_recurrence_do_not_decay():
    def decayed(layer):
        groups = optimizer_groups(layer, lr=1e-3, weight_decay=0.1)
        return {name for group in groups if group["weight_decay"] for name in group["names"]}

    assert decayed(make("mamba2")) == {"in_proj.weight", "conv1d.weight", "out_proj.weight"}
    assert decayed(make("mamba3", out_norm=True)) == {"in_proj.weight", "out_proj.weight"}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Mamba2Config, {"dt_min": 1.0}),
        (Mamba2Config, {"A_min": 20.0}),
        (Mamba2Config, {"dt_lower": 0.2, "dt_upper": 0.1}),
        (Mamba2Config, {"n_groups": 0}),
        (Mamba3Config, {"dt_min": 1.0}),
        (Mamba3Config, {"state_size": 2}),
        (Mamba3Config, {"rope": "none"}),
    ],
)
def test_a_wrong_setting_is_refused(kind, settings):
    with pytest.raises(ValueError):
        kind(**settings)


@pytest.mark.parametrize("kind", [Mamba2Config, Mamba3Config])
def test_a_width_that_makes_no_whole_heads_is_refused_with_what_would_do(kind):
    with pytest.raises(ValueError, match="use head_dim 32, or dim 32"):
        kind().fit(16)
    with pytest.raises(ValueError, match="use n_groups 2"):
        kind(n_groups=4).fit(64)
    for settings, dim in (({"head_dim": 32}, 16), ({}, 32), ({"n_groups": 2}, 64), ({"expand": 3}, 64)):
        kind(**settings).fit(dim)
