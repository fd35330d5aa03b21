"""The mixers compute the papers' equations, token by token, whatever is masked, reset or split.

The equations are taken as they stand in the papers: dense matrices of all states, conjugates included, discretised by
a matrix exponential or a matrix inverse.
"""

from __future__ import annotations

import math

import pytest
import torch
from altx_s4.config import S4Config, S4DConfig, S5Config
from altx_s4.s4 import S4
from altx_s4.s4 import build as build_s4
from altx_s4.s4d import S4D
from altx_s4.s4d import build as build_s4d
from altx_s4.s5 import S5
from altx_s4.s5 import build as build_s5
from torch import Tensor
from torch.nn import functional as F

from altx import pieces
from altx.context import Context
from altx.errors import AltxError, UnsupportedContext
from altx.layer import Layer
from altx.optim import optimizer_groups
from altx.spec import BuildContext

DIM, ROWS, TOKENS = 6, 3, 41

KINDS = {"s4d": (S4DConfig, build_s4d), "s4": (S4Config, build_s4), "s5": (S5Config, build_s5)}
FORMS = {
    "s4d": ("s4d", {"state_size": 8}),
    "s4d bilinear": ("s4d", {"state_size": 6, "discretization": "bilinear", "init": "inv"}),
    "s4d real": ("s4d", {"state_size": 6, "init": "real"}),
    "s4": ("s4", {"state_size": 8}),
    "s4 shared": ("s4", {"state_size": 6, "n_ssm": 2}),
    "s5": ("s5", {"state_size": 12, "blocks": 3}),
    "s5 bilinear": ("s5", {"state_size": 8, "blocks": 1, "discretization": "bilinear", "activation": "full_glu"}),
}


def make(kind: str, seed: int = 0, dim: int = DIM, **settings) -> Layer:
    torch.manual_seed(seed)
    config, build = KINDS[kind]
    return build(config(**settings), BuildContext(dim=dim))


def moved(kind: str, **settings) -> Layer:
    """In float64, with every parameter moved far from where it starts."""
    layer = make(kind, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        if kind == "s5":
            layer.Lambda_re.copy_(-layer.Lambda_re.abs() - 0.1)
    return layer


@pytest.fixture(params=FORMS)
def mixer(request) -> Layer:
    kind, settings = FORMS[request.param]
    return moved(kind, **settings)


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
    reset = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.15
    reset[0, 6] = reset[1, 7] = reset[1, 8] = True
    return reset


def complex_of(z: Tensor) -> Tensor:
    return torch.view_as_complex(z.detach().contiguous())


def with_conjugates(z: Tensor, axis: int = -1) -> Tensor:
    return torch.cat([z, z.conj()], axis)


def discretized(A: Tensor, B: Tensor, dt: Tensor | float, how: str) -> tuple[Tensor, Tensor]:
    """A-bar (S, S) and B-bar (S, I). dt: a number, or one for each state of a diagonal A."""
    size, inputs = B.shape
    dt = torch.as_tensor(dt, dtype=torch.float64).expand(size).to(A.dtype)
    A, B = dt[:, None] * A, dt[:, None] * B
    if how == "bilinear":
        eye = torch.eye(size, dtype=A.dtype)
        return torch.linalg.solve(eye - A / 2, eye + A / 2), torch.linalg.solve(eye - A / 2, B)
    joint = torch.cat([torch.cat([A, B], 1), A.new_zeros(inputs, size + inputs)])
    joint = torch.linalg.matrix_exp(joint)
    return joint[:size, :size], joint[:size, size:]


def systems(layer: Layer):
    """Dense (A-bar, B-bar, C) over which inputs: one for each channel, or one for all."""
    if isinstance(layer, S5):
        A = torch.complex(layer.Lambda_re, layer.Lambda_im).detach()
        dt = layer.log_step[:, 0].detach().exp()
        how = "bilinear" if layer.discretize.__name__ == "bilinear" else "zoh"
        A, B = discretized(
            torch.diag(with_conjugates(A)), with_conjugates(complex_of(layer.B), 0), with_conjugates(dt), how
        )
        yield A, B, with_conjugates(complex_of(layer.C), 1)
        return
    for d in range(len(layer.output_linear[0].weight) // 2):
        if isinstance(layer, S4D):
            kernel, how = layer.kernel, "bilinear" if layer.discretize.__name__ == "bilinear" else "zoh"
            A = torch.complex(-kernel.log_A_real[d].exp(), kernel.A_imag[d]).detach()
            A, B, C = torch.diag(with_conjugates(A)), torch.ones(2 * len(A), 1, dtype=A.dtype), complex_of(kernel.C[d])
            dt = kernel.log_dt[d].exp().item()
        else:
            assert isinstance(layer, S4)
            kernel, how = layer.layer.kernel, "bilinear"
            s = d % len(kernel.A_real)
            A = with_conjugates(torch.complex(-kernel.A_real[s].exp(), -kernel.A_imag[s]).detach())
            P, B = (with_conjugates(complex_of(z[0, s])) for z in (kernel.P, kernel.B))
            A, B, C = torch.diag(A) - torch.outer(P, P.conj()), B[:, None], complex_of(kernel.C[0, d])
            dt = kernel.inv_dt[d].exp().item()
        A, B = discretized(A, B, dt, how)
        yield A, B, with_conjugates(C)[None]


def filtered(layer: Layer, x_TD: Tensor) -> Tensor:
    """y = C h, one token and one system at a time."""
    outputs = []
    for index, (A, B, C) in enumerate(systems(layer)):
        u = x_TD if B.shape[1] == x_TD.shape[1] else x_TD[:, index : index + 1]
        h, ys = A.new_zeros(len(A)), []
        for u_t in u:
            h = A @ h + B @ u_t.to(B.dtype)
            y = C @ h
            assert y.imag.abs().max() < 1e-9 * (1 + y.real.abs().max())
            ys.append(y.real)
        outputs.append(torch.stack(ys) if ys else x_TD.new_zeros(0, len(C)))
    return torch.cat(outputs, 1)


def by_hand(layer: Layer, x_TD: Tensor) -> Tensor:
    D = layer.layer.D[0] if isinstance(layer, S4) else layer.D
    y = filtered(layer, x_TD) + D.detach() * x_TD
    if isinstance(layer, S5):
        g = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        left = g @ layer.out1.weight.T + layer.out1.bias if layer.activation == "full_glu" else g
        return left * torch.sigmoid(g @ layer.out2.weight.T + layer.out2.bias)
    g = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    z = g @ layer.output_linear[0].weight.T + layer.output_linear[0].bias
    return z[:, : z.shape[1] // 2] * torch.sigmoid(z[:, z.shape[1] // 2 :])


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
@pytest.mark.parametrize("hard", [False, True])
def test_any_split_gives_the_same_outputs_and_state(mixer, x, holes, resets, split, hard):
    ctx = Context(mask=holes, reset=resets) if hard else Context()
    whole = mixer(x, ctx, mixer.init_state(ROWS))
    state, start, ys = mixer.init_state(ROWS), 0, []
    for count in split:
        out = mixer(x[:, start : start + count], ctx.slice(start, start + count), state)
        state, start = out.state, start + count
        ys.append(out.y)
    real = holes if hard else torch.ones_like(holes)
    torch.testing.assert_close(torch.cat(ys, 1)[real], whole.y[real], atol=1e-10, rtol=0)
    torch.testing.assert_close(mixer(x, ctx).y[real], whole.y[real], atol=1e-10, rtol=0)
    for name, leaf in whole.state.flat().items():
        torch.testing.assert_close(state.flat()[name], leaf, atol=1e-10, rtol=0)
    assert state.seen.tolist() == (holes.sum(1).tolist() if hard else [TOKENS] * ROWS)


@pytest.mark.parametrize("how", ["reference", "torch", "native"])
def test_convolution_and_recurrence_of_the_same_weights_agree(mixer, x, how, monkeypatch):
    """The backend "torch" convolves chunk by chunk, the others step token by token."""
    expected = mixer(x, state=mixer.init_state(ROWS))
    monkeypatch.setenv("ALTX_KERNEL", how)
    found = mixer(x, state=mixer.init_state(ROWS))
    torch.testing.assert_close(found.y, expected.y, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.state["ssm"], expected.state["ssm"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional_layers_add_a_system_that_runs_from_the_end(kind, x, holes):
    settings = {"s4d": {"state_size": 6}, "s4": {"state_size": 6}, "s5": {"state_size": 8, "blocks": 2}}[kind]
    both = moved(kind, bidirectional=True, **settings)
    one = make(kind, **settings).double()
    back = make(kind, **settings).double()
    weights = both.state_dict()
    for layer, index in ((one, 0), (back, 1)):
        mine = {name: w for name, w in weights.items() if name not in ("C1", "C2")}
        if kind == "s5":
            mine["C"] = weights[f"C{index + 1}"]
        elif kind == "s4":
            mine["layer.kernel.C"] = weights["layer.kernel.C"][index : index + 1]
        else:
            mine["kernel.C"] = weights["kernel.C"][index]
        layer.load_state_dict(mine)
    for mask in (None, holes):
        if mask is not None:
            x = x.masked_fill(~mask[..., None], float("nan"))
        found = both(x, Context(causal=False, mask=mask)).y
        for row in range(ROWS):
            tokens = x[row] if mask is None else x[row, mask[row]]
            later = filtered(back, tokens.flip(0)).flip(0)
            if kind != "s5":  # there it sees the token itself too
                later = F.pad(later[1:], (0, 0, 0, 1))
            D = both.layer.D[0] if kind == "s4" else both.D
            expected = both.output(filtered(one, tokens) + later + D * tokens)
            torch.testing.assert_close(
                found[row] if mask is None else found[row, mask[row]], expected, atol=1e-10, rtol=0
            )


@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional_layers_refuse_what_they_cannot_do_and_say_why(kind, x):
    layer = make(kind, bidirectional=True).double()
    assert layer.init_state(2) is None
    with pytest.raises(UnsupportedContext, match="cannot be causal"):
        layer(x)
    with pytest.raises(UnsupportedContext, match="no resets"):
        layer(x, Context(causal=False, reset=torch.zeros(ROWS, TOKENS, dtype=torch.bool)))


def test_a_causal_model_with_a_bidirectional_layer_is_refused():
    from altx.compose import compose

    with pytest.raises(AltxError, match="causal"):
        compose({"dim": 16, "mixer": [{"name": "s4d", "bidirectional": True}]})


@pytest.mark.parametrize("count", [1, 7])
def test_masked_tokens_leave_the_state_exactly_as_it_was(mixer, x, count):
    state = mixer(x, state=mixer.init_state(ROWS)).state
    after = mixer(x[:, :count], Context(mask=torch.zeros(ROWS, count, dtype=torch.bool)), state).state
    assert all(torch.equal(after.flat()[name], leaf) for name, leaf in state.flat().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_in_bfloat16_stays_in_float32(kind):
    assert make(kind).init_state(2, dtype=torch.bfloat16)["ssm"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_under_autocast_and_in_bfloat16(kind, x):
    layer = make(kind)
    expected = layer(x.float()).y
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.float(), state=layer.init_state(ROWS))
    (out.y.float().sum() + out.state["ssm"].sum()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(out.y.float(), expected, atol=0.05, rtol=0.05)
    out = layer.bfloat16()(x.bfloat16(), state=layer.init_state(ROWS))
    assert (out.y.dtype, out.state["ssm"].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.y.float(), expected, atol=0.2, rtol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_on_the_meta_device_where_costs_are_counted(kind):
    layer = make(kind).to("meta")
    out = layer(torch.empty(2, 40, DIM, device="meta"), state=layer.init_state(2))
    assert out.y.shape == (2, 40, DIM) and out.state["ssm"].is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_takes_training_and_decoding_whole(kind):
    layer, x = make(kind), torch.randn(2, 5, DIM)
    layer(x).y.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).y.square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    state = layer.init_state(2)
    with torch.no_grad():
        whole = layer(x[:, :1], state=state)
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x[:, :1], state=state)
    torch.testing.assert_close(found.y, whole.y)
    torch.testing.assert_close(found.state["ssm"], whole.state["ssm"])
    assert not state["ssm"].any(), "the state passed in is written to"


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence_without_gradients_comes_in_pieces_and_is_the_same(kind, x, monkeypatch):
    layer, lengths = moved(kind), []
    expected = layer(x, state=layer.init_state(ROWS))
    monkeypatch.setattr(pieces, "TOKENS", 24)
    monkeypatch.setattr(pieces, "SHORTEST", 3)
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x, *a: lengths.append(x.shape[1]) or forward(self, x, *a))
    with torch.no_grad():
        found = layer(x, Context(), layer.init_state(ROWS))
    assert lengths == [TOKENS, 8, 8, 8, 8, 8, 1]
    torch.testing.assert_close(found.y, expected.y, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.state["ssm"], expected.state["ssm"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_step_sizes_start_log_uniform_and_the_skip_normal(kind):
    layer = make(kind, dim=512, dt_min=0.002, dt_max=0.05, **({"state_size": 1024} if kind == "s5" else {}))
    log_dt = {"s4": lambda: layer.layer.kernel.inv_dt, "s4d": lambda: layer.kernel.log_dt, "s5": lambda: layer.log_step}
    dt = log_dt[kind]().exp()
    assert 0.002 <= dt.min() < 0.0022 and 0.045 < dt.max() <= 0.0501
    assert dt.log().mean().item() == pytest.approx((math.log(0.002) + math.log(0.05)) / 2, abs=0.15)
    assert dt.log().std().item() == pytest.approx(math.log(25) / 12**0.5, rel=0.07)
    D = layer.layer.D if kind == "s4" else layer.D
    assert D.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_system_learns_slowly_and_does_not_decay(kind):
    system = {
        "s4": {"layer.kernel.inv_dt", "layer.kernel.A_real", "layer.kernel.A_imag", "layer.kernel.B", "layer.kernel.P"},
        "s4d": {"kernel.log_dt", "kernel.log_A_real", "kernel.A_imag"},
        "s5": {"Lambda_re", "Lambda_im", "B", "log_step"},
    }[kind]

    def options(layer):
        groups = optimizer_groups(layer, lr=3e-3, weight_decay=0.1)
        return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}

    found = options(make(kind))
    assert {name for name, (lr, _) in found.items() if lr == 0.001} == system
    assert all(found[name][1] == 0 for name in system)
    found = options(make(kind, lr=None))
    assert {lr for lr, _ in found.values()} == {3e-3} and all(found[name][1] == 0 for name in system)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("s4", {"state_size": 7}), ("s4", {"n_ssm": 0}), ("s4", {"lr": 0.0}), ("s4", {"dt_min": 1.0}),
        ("s4d", {"state_size": 0}), ("s4d", {"init": "hippo"}), ("s4d", {"discretization": "euler"}),
        ("s5", {"state_size": 10}), ("s5", {"blocks": 3}), ("s5", {"activation": "relu"}),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused(kind, settings):
    with pytest.raises(ValueError):
        KINDS[kind][0](**settings)


def test_copies_that_do_not_divide_the_width_are_refused_with_what_would():
    with pytest.raises(ValueError, match=r"use one of \[1, 2, 3, 6\]"):
        S4Config(n_ssm=4).fit(6)
    with pytest.raises(ValueError, match="use 16, or other blocks"):
        S5Config(state_size=18)
