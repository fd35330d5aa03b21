"""One token of Mamba-2 and Mamba-3 in one call equals the equations, and never writes to a state it was not given."""

from __future__ import annotations

import pytest
import torch
from altx_mamba import mamba2, mamba3
from altx_mamba.kernels.mamba2_step import cases as cases2
from altx_mamba.kernels.mamba2_step import mamba2_step
from altx_mamba.kernels.mamba3_step import cases as cases3
from altx_mamba.kernels.mamba3_step import mamba3_step
from altx_mamba.kernels.one_token import ALONE, ROWS
from altx_mamba.mamba2_config import Mamba2Config
from altx_mamba.mamba3_config import Mamba3Config
from torch import nn

from altx.context import Context
from altx.spec import BuildContext
from altx_kernels import KernelError
from altx_kernels.op import record
from altx_kernels.verify import verify

DIM, TOKENS = 12, 7
STATES = {"mamba2-step": ("past", "h"), "mamba3-step": ("h", "angle", "k", "v")}
FORMS = {
    "mamba2": (mamba2, Mamba2Config(state_size=8, head_dim=4)),
    "mamba2 groups": (
        mamba2,
        Mamba2Config(
            state_size=5, head_dim=4, n_groups=2, bias=True, conv_bias=False, conv_kernel=3, dt_lower=0.3, norm_eps=0.1
        ),
    ),
    "mamba2 limits": (mamba2, Mamba2Config(state_size=8, head_dim=3, dt_upper=0.7, expand=3, conv_kernel=1)),
    "mamba3": (mamba3, Mamba3Config(state_size=8, head_dim=4)),
    "mamba3 groups": (mamba3, Mamba3Config(state_size=7, head_dim=4, n_groups=2, rope="full", decay="heavy-tail")),
    "mamba3 norm": (mamba3, Mamba3Config(state_size=8, head_dim=3, out_norm=True, A_floor=0.5, norm_eps=0.1)),
}


@pytest.fixture(params=[mamba2_step, mamba3_step], ids=lambda op: op.name)
def op(request):
    return request.param


def arguments(op, rows, width, heads, head_dim, groups, size, last, **options):
    """Without gradients; `last` are taps or angles."""
    cases = cases2 if op is mamba2_step else cases3
    values = cases.arguments(cases.Sizes(rows, width, heads, head_dim, groups, size, last), **options)
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.fixture
def values(op):
    return arguments(op, 3, 21, 4, 9, 2, 7, 3)


def make(form, dtype=torch.float64):
    """A mixer with every parameter moved far from where it starts."""
    module, config = FORMS[form]
    torch.manual_seed(0)
    layer = module.build(config, BuildContext(dim=DIM, num_layers=1)).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
        layer.dt_bias.add_(3)  # else the states hardly move
    return layer


def step_through(layer, x, donate=False):
    """y and the last state, token by token, and what ops were chosen."""
    state, ys = layer.init_state(len(x)), []
    with record() as choices:
        for t in range(x.shape[1]):
            out = layer(x[:, t : t + 1], Context(donate_state=donate), state)
            state = out.state
            ys.append(out.y)
    return torch.cat(ys, 1), state, {choice.op for choice in choices}


def test_every_backend_equals_the_reference(op):
    findings = list(verify(op))
    assert not [finding for finding in findings if finding.status == "failed"], findings
    assert op.backends["native"].absent() or any(f.calls for f in findings if f.backend == "native")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_only_donated_states_are_written_to(op, values, backend):
    if reason := op.backends[backend].absent():
        pytest.skip(reason)
    before = {name: values[name].clone() for name in STATES[op.name]}
    with torch.no_grad():
        apart = op(**values, backend=backend)
        assert all(torch.equal(values[name], before[name]) for name in before)
        donated = op(**values, donate=True, backend=backend)
    for found, expected in zip(donated, apart, strict=True):
        assert torch.equal(found, expected)
    if backend == "native":
        for name, found in zip(before, donated[1:], strict=True):
            assert found.data_ptr() == values[name].data_ptr(), f"{name} was given up, and copied all the same"


@pytest.mark.parametrize("rows", [1, 2])
def test_two_threads_compute_what_one_does(op, rows):
    values = arguments(op, rows, 300, 10, 60, 2, 16, 4)
    assert ALONE < 300 * 600
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            one = op(**values)
            torch.set_num_threads(2)
            two = op(**values)
            torch.set_num_threads(16)  # more than there are heads in a row
            many = op(**values)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(one, two, many, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)
        torch.testing.assert_close(a, c, atol=1e-13, rtol=1e-13)


def test_a_nan_stays_in_its_row(op, values):
    values["x"] = values["x"].clone()
    values["x"][1, 0] = float("nan")
    with torch.no_grad():
        found = op(**values)
    assert found[0][1].isnan().all() and all(state[1].isnan().any() for state in found[1:])
    assert all(part[[0, 2]].isfinite().all() for part in found)


def test_wrong_calls_are_refused_with_the_reason(op, values):
    if reason := op.backends["native"].absent():
        pytest.skip(reason)
    with pytest.raises(KernelError, match="gradients are wanted"):
        op(**{**values, "D": values["D"].clone().requires_grad_()}, backend="native")
    with pytest.raises(KernelError, match="float32"), torch.no_grad():
        op(**{**values, "D": values["D"].float()}, backend="native")
    with pytest.raises(KernelError, match=f"{ROWS + 1} rows"), torch.no_grad():
        op(**arguments(op, ROWS + 1, 21, 4, 9, 2, 7, 3), backend="native")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, ROWS, ROWS + 1])
@pytest.mark.parametrize("donate", [False, True])
def test_stepping_through_a_mixer_equals_passing_all_at_once(form, rows, donate):
    layer = make(form)
    x = torch.randn(rows, TOKENS, DIM, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x, state=layer.init_state(rows))
        y, state, ops = step_through(layer, x, donate)
    assert (f"{form.split()[0]}-step" in ops) == (rows <= ROWS)
    torch.testing.assert_close(y, whole.y, atol=1e-11, rtol=1e-11)
    for name, leaf in whole.state.flat().items():
        torch.testing.assert_close(state.flat()[name], leaf, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("form", ["mamba2", "mamba3"])
def test_angles_and_states_hold_over_many_tokens_in_float32(form):
    layer, x = make(form), torch.randn(1, 1000, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x, state=layer.init_state(1))
        y, _, _ = step_through(layer.float(), x.float(), donate=True)
    torch.testing.assert_close(y.double(), expected.y, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_through_a_step(form):
    layer, x = make(form), torch.randn(2, 3, DIM, dtype=torch.float64)
    layer(x).y.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    step_through(layer, x)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_torch_compile_takes_decoding_whole(form):
    layer, x = make(form), torch.randn(2, 1, DIM, dtype=torch.float64)
    torch._dynamo.reset()
    with torch.no_grad():
        state = layer(x, state=layer.init_state(2)).state
        before = {name: leaf.clone() for name, leaf in state.flat().items()}
        expected = layer(x, state=state)
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, state=state)
    torch.testing.assert_close(found.y, expected.y)
    for name, leaf in expected.state.flat().items():
        torch.testing.assert_close(found.state.flat()[name], leaf)
        assert torch.equal(state.flat()[name], before[name]), f"{name}, passed in, is written to"


class Doubled(nn.Linear):
    """What an adapter is to a step: a module of another class in the place of a known one."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("form", ["mamba2", "mamba3 norm"])
def test_a_module_that_was_changed_is_called_while_decoding_too(form):
    layer, x = make(form), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    proj = layer.out_proj
    layer.out_proj = Doubled(proj.in_features, proj.out_features, bias=False).double()
    layer.out_proj.load_state_dict(proj.state_dict())
    layer.norm.register_forward_hook(lambda module, args, output: 3 * output)
    with torch.no_grad():
        torch.testing.assert_close(step_through(layer, x)[0], layer(x).y)


@pytest.mark.parametrize("form", ["mamba2", "mamba3"])
def test_autocast_makes_one_token_what_it_makes_of_several(form):
    layer, x = make(form, torch.float32), torch.randn(2, TOKENS, DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, _, _ = step_through(layer, x)
        whole = layer(x).y
    assert y.dtype == whole.dtype
