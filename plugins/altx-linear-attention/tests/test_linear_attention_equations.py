"""The linear recurrences compute their papers' equations, token by token, whatever is masked or reset."""

from __future__ import annotations

import math

import pytest
import torch

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.context import Context
from altx.layer import Layer
from altx.resolve import resolve

DIM, ROWS, TOKENS = 12, 3, 41
LAYER, LAYERS = 1, 3

FORMS = {
    "linear-attention": ("linear-attention", {"heads": 2}),
    "linear-attention exp": ("linear-attention", {"heads": 3, "feature_map": "exp", "eps": 0.01}),
    "retnet": ("retnet", {"heads": 2}),
    "lightning": ("lightning", {"heads": 3}),
    "lightning narrow": ("lightning", {"heads": 2, "head_dim": 4}),
    "gla": ("gla", {"heads": 2}),
    "gla convolved": ("gla", {"heads": 3, "short_conv": True, "conv_bias": True, "conv_kernel": 3, "gate_min": -0.1}),
    "hgrn2": ("hgrn2", {"expand_ratio": 4}),
    "hgrn2 convolved": ("hgrn2", {"expand_ratio": 6, "short_conv": True, "lower_bound": False}),
    "mlstm": ("mlstm", {"heads": 2}),
    "mlstm uncapped": ("mlstm", {"heads": 3, "qk_dim_factor": 1.0, "v_dim_factor": 2.0, "gate_soft_cap": None}),
    "mlstm pre-up": ("mlstm", {"block": "pre-up", "heads": 2, "qkv_block": 2, "conv_kernel": 3, "bias": True}),
}


def make(name: str, dim: int = DIM, layer: int = LAYER, layers: int = LAYERS, seed: int = 0, **config) -> Layer:
    torch.manual_seed(seed)
    blueprint = resolve(
        validate(ModelConfig, {"dim": dim, "blocks": [{"sublayers": [{"mixer": {"name": name, **config}}]}]}),
        registry.default(),
    )
    return build_branch(blueprint.blocks[0][0], BuildContext(dim=dim, layer=layer, num_layers=layers))


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
        if form[0] == "mlstm" and "block" not in form[1]:
            layer.igate_preact.bias.zero_()  # else hardly anything is ever written
            layer.fgate_preact.bias.sub_(2)
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
    reset[0, 6] = reset[1, 7] = reset[1, 8] = reset[2, 0] = True
    return reset


def silu(x):
    return x * torch.sigmoid(x)


def rms(x, eps):
    return x / (x.square().mean() + eps).sqrt()


class Taps:
    """A short convolution over a growing list of inputs."""

    def __init__(self, conv, activate=True):
        self.conv, self.activate, self.past = conv, activate, []

    def __call__(self, x):
        if self.conv is None:
            return x
        self.past.append(x)
        weight = self.conv.weight[:, 0]
        y = torch.zeros_like(x) if self.conv.bias is None else self.conv.bias
        for back in range(min(weight.shape[1], len(self.past))):
            y = y + weight[:, -1 - back] * self.past[-1 - back]
        return silu(y) if self.activate else y


def linear_attention(layer, config, xs, positions):
    H, ys = config["heads"], []
    S = [0.0] * H
    z = [0.0] * H
    for x in xs:
        q, k, v = (p(x).chunk(H) for p in (layer.query_projection, layer.key_projection, layer.value_projection))
        o = []
        for h in range(H):
            if config.get("feature_map") == "exp":
                phi_q, phi_k = q[h].softmax(-1), k[h].exp()
            else:
                phi_q, phi_k = (torch.where(part > 0, part + 1, part.exp()) for part in (q[h], k[h]))
            S[h] = S[h] + torch.outer(phi_k, v[h])
            z[h] = z[h] + phi_k
            o.append(phi_q @ S[h] / (phi_q @ z[h] + config.get("eps", 1e-6)))
        ys.append(layer.out_projection(torch.cat(o)))
    return ys


def retnet(layer, config, xs, positions):
    H, ys = config["heads"], []
    width = DIM // H
    S, c = [0.0] * H, [0.0] * H
    theta = [10000 ** (-i / (width // 2 - 1)) for i in range(width // 2)]

    def turned(part, position):
        turn = torch.tensor([t * position for t in theta], dtype=torch.float64)
        by = torch.polar(torch.ones_like(turn), turn)
        return torch.view_as_real(torch.view_as_complex(part.reshape(-1, 2)) * by).flatten()

    for x, position in zip(xs, positions, strict=True):
        q, k, v, g = (p(x).chunk(H) for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.g_proj))
        o = []
        for h in range(H):
            gamma = 1 - 2.0 ** (-5 - h)
            S[h] = gamma * S[h] + torch.outer(turned(k[h], position), v[h])
            c[h] = gamma * c[h] + 1
            o.append(rms(turned(q[h], position) @ S[h] / math.sqrt(width * c[h]), 1e-6) * silu(g[h]))
        ys.append(layer.out_proj(torch.cat(o)))
    return ys


def lightning(layer, config, xs, positions):
    H, ys = config["heads"], []
    S = [0.0] * H
    for x in xs:
        o = []
        for h, part in enumerate(silu(layer.qkv_proj(x)).chunk(H)):
            q, k, v = part.chunk(3)
            slope = 2 ** (-8 * (h + 1) / H) * (1 - LAYER / (LAYERS - 1 + 1e-5) + 1e-5)
            S[h] = math.exp(-slope) * S[h] + torch.outer(k, v)
            o.append(q @ S[h])
        y = rms(torch.cat(o), 1e-6) * layer.norm.weight
        ys.append(layer.out_proj(y * torch.sigmoid(layer.output_gate(x))))
    return ys


def gla(layer, config, xs, positions):
    H, ys = config["heads"], []
    S = [0.0] * H
    taps = [Taps(conv) for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)]
    for x in xs:
        q, k, v = (tap(p(x)).chunk(H) for tap, p in zip(taps, (layer.q_proj, layer.k_proj, layer.v_proj), strict=True))
        decay = torch.sigmoid(layer.gk_proj(x)) ** (1 / 16)
        decay = decay.clamp(min=math.exp(config.get("gate_min", -math.inf))).chunk(H)
        gate, o = layer.g_proj(x).chunk(H), []
        for h in range(H):
            S[h] = decay[h][:, None] * S[h] + torch.outer(k[h], v[h])
            o.append(rms(q[h] @ S[h] / len(q[h]) ** 0.5, 1e-5) * layer.g_norm_swish_gate.weight * silu(gate[h]))
        ys.append(layer.o_proj(torch.cat(o)))
    return ys


def hgrn2(layer, config, xs, positions):
    H, ys = DIM // config["expand_ratio"], []
    S = [0.0] * H
    taps = [Taps(conv, activate=False) for conv in (layer.q_conv1d, layer.f_conv1d, layer.i_conv1d)]
    bound = 0.0
    if layer.lower_bounds is not None:
        shares = layer.lower_bounds.softmax(0)
        bound = (shares.cumsum(0) - shares[0])[LAYER]
    for x in xs:
        q, f, i = (tap(p(x)) for tap, p in zip(taps, (layer.q_proj, layer.f_proj, layer.i_proj), strict=True))
        f = bound + (1 - bound) * torch.sigmoid(f)
        o = []
        for h, (q_, f_, i_) in enumerate(zip(silu(q).chunk(H), f.chunk(H), i.chunk(H), strict=True)):
            S[h] = f_[:, None] * S[h] + torch.outer(1 - f_, i_)
            o.append(q_ @ S[h] / len(q_) ** 0.5)
        ys.append(layer.o_proj(rms(torch.cat(o), 1e-5) * layer.g_norm.weight))
    return ys


class Cell:
    """Equations 19 to 27 as they stand, without the stabiliser but in eps, which the authors' code adds last."""

    def __init__(self, heads, norm_eps):
        self.norm_eps = norm_eps
        self.C, self.n, self.m = ([0.0] * heads for _ in range(3))

    def __call__(self, qs, ks, vs, i, f):
        """The normed heads end to end."""
        out = []
        for h, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True)):
            self.C[h] = torch.sigmoid(f[h]) * self.C[h] + i[h].exp() * torch.outer(k, v)
            self.n[h] = torch.sigmoid(f[h]) * self.n[h] + i[h].exp() * k
            self.m[h] = torch.maximum(torch.log(torch.sigmoid(f[h])) + self.m[h], i[h])
            q = q / len(q) ** 0.5
            y = q @ self.C[h] / ((q @ self.n[h]).abs().clamp(min=1) + 1e-6 * self.m[h].exp())
            out.append((y - y.mean()) / (y.var(unbiased=False) + self.norm_eps).sqrt())
        return torch.cat(out)


def mlstm(layer, config, xs, positions):
    if config.get("block") == "pre-up":
        return mlstm_pre_up(layer, config, xs)
    H, ys = config["heads"], []
    cap, cell = config.get("gate_soft_cap", 15.0), Cell(H, 1e-6)
    for x in xs:
        q, k, v = (p(x).chunk(H) for p in (layer.q, layer.k, layer.v))
        i, f = layer.igate_preact(x), layer.fgate_preact(x)
        if cap:
            i, f = cap * torch.tanh(i / cap), cap * torch.tanh(f / cap)
        y = cell(q, k, v, i, f) * layer.multihead_norm.weight * torch.sigmoid(layer.ogate_preact(x))
        ys.append(layer.out_proj(y))
    return ys


def mlstm_pre_up(layer, config, xs):
    H, ys = config["heads"], []
    taps, cell = Taps(layer.conv1d), Cell(H, 1e-5)
    gates = layer.mlstm_cell
    for x in xs:
        u, z = layer.proj_up(x).chunk(2)
        c = taps(u)
        q, k, v = (
            torch.cat([W @ part for W, part in zip(p.weight, into.split(config["qkv_block"]), strict=True)]) + p.bias
            for p, into in ((layer.q_proj, c), (layer.k_proj, c), (layer.v_proj, u))
        )
        i, f = gates.igate(torch.cat([q, k, v])), gates.fgate(torch.cat([q, k, v]))
        h = cell(q.chunk(H), k.chunk(H), v.chunk(H), i, f) * (1 + gates.outnorm.weight)
        ys.append(layer.proj_down((h + layer.learnable_skip * c) * silu(z)))
    return ys


BY_HAND = {
    "linear-attention": linear_attention, "retnet": retnet, "lightning": lightning, "gla": gla, "hgrn2": hgrn2,
    "mlstm": mlstm,
}  # fmt: skip


@pytest.fixture
def assert_rows_by_hand(form, mixer):
    """y equals the equations on the real tokens of each of its sequences."""

    def check(x, y, mask=None, reset=None, positions=None):
        for row in range(len(x)):
            real = torch.arange(x.shape[1]) if mask is None else mask[row].nonzero()[:, 0]
            starts = [] if reset is None else reset[row, real].nonzero()[:, 0].tolist()
            at = torch.arange(len(real)) if positions is None else positions[row, real]
            for piece, place in zip(torch.tensor_split(real, starts), torch.tensor_split(at, starts), strict=True):
                if len(piece):
                    expected = torch.stack(BY_HAND[form[0]](mixer, form[1], x[row, piece], place.tolist()))
                    torch.testing.assert_close(y[row, piece], expected, atol=1e-10, rtol=1e-10)

    return check


def test_it_computes_the_papers_equations(mixer, assert_rows_by_hand, x):
    assert_rows_by_hand(x, mixer(x).y)


def test_masked_tokens_count_as_absent_in_any_pattern(mixer, assert_rows_by_hand, x, holes):
    x[~holes] = float("nan")
    assert_rows_by_hand(x, mixer(x, Context(mask=holes)).y, holes)


def test_a_reset_starts_a_fresh_sequence_masked_or_not(mixer, assert_rows_by_hand, x, holes, resets):
    assert_rows_by_hand(x, mixer(x, Context(reset=resets)).y, None, resets)
    assert_rows_by_hand(x, mixer(x, Context(mask=holes, reset=resets)).y, holes, resets)


def test_positions_are_those_given(mixer, assert_rows_by_hand, x, holes):
    positions = torch.randint(1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(4))
    y = mixer(x, Context(mask=holes, positions=positions)).y
    assert_rows_by_hand(x, y, holes, positions=positions)


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


@pytest.mark.parametrize("count", [1, 41])
def test_it_trains_under_autocast(form, count, x):
    layer = make(form[0], **form[1])
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x[:, :count].float(), state=layer.init_state(ROWS))
    (out.y.float().sum() + sum(leaf.sum() for leaf in out.state.leaves.values())).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    torch.testing.assert_close(out.y.float(), layer(x[:, :count].float()).y, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("masked", [False, True])
def test_linear_attention_that_looks_both_ways_reads_all_of_its_own_sequence(x, holes, resets, masked):
    mixer = make("linear-attention", heads=2).double()
    mask = holes if masked else torch.ones_like(holes)
    y = mixer(x, Context(causal=False, mask=holes if masked else None, reset=resets)).y
    for row in range(ROWS):
        real = mask[row].nonzero()[:, 0]
        for piece in torch.tensor_split(real, resets[row, real].nonzero()[:, 0].tolist()):
            for t in piece.tolist():
                # Its own token last, which is then the one that has seen everything.
                others = [s for s in piece.tolist() if s != t]
                expected = mixer(x[row, [*others, t]][None]).y[0, -1]
                torch.testing.assert_close(y[row, t], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_the_sums_of_linear_attention_do_not_overflow_in_16_bits(causal, reset):
    layer = make("linear-attention", heads=1)
    with torch.no_grad():
        for projection in (layer.query_projection, layer.key_projection):
            projection.bias.fill_(30.0)
    x = torch.randn(1, 400, DIM, generator=torch.Generator().manual_seed(0))
    ctx = Context(causal=causal, reset=torch.arange(400)[None] == 3 if reset else None)
    with torch.no_grad():
        expected = layer(x, ctx).y
        found = layer.half()(x.half(), ctx).y
    torch.testing.assert_close(found.float(), expected, atol=0.01, rtol=0)


def test_gates_of_any_size_overflow_nothing_in_mlstm():
    layer = make("mlstm", heads=2, gate_soft_cap=None)
    x = 100 * torch.randn(1, 50, DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for gate in (layer.igate_preact, layer.fgate_preact):
            gate.weight.normal_(generator=torch.Generator().manual_seed(0))
        out = layer(x, state=layer.init_state(1))
        expected = layer.double()(x.double()).y
    assert out.y.isfinite().all() and out.state["m"].abs().max() > 100
    torch.testing.assert_close(out.y.double(), expected, atol=1e-3, rtol=1e-3)


def test_retention_at_the_millionth_token_is_as_exact_as_at_the_first():
    layer = make("retnet", heads=2)
    x = torch.randn(1, 30, DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        near = layer(x).y
        far = layer(x, Context(positions=torch.arange(10**6, 10**6 + 30)[None])).y
    torch.testing.assert_close(far, near, atol=1e-5, rtol=1e-5)
