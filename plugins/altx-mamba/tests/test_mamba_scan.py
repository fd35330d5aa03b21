"""The selective scan: every backend equals the reference, whatever it is given and however it is called."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from altx_mamba.kernels.selective_scan import OP, native, reference, selective_scan, vendor
from altx_mamba.kernels.selective_scan.cases import OPTIONS, example, workload
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from altx_kernels import KernelError
from altx_kernels.verify import TOLERANCES, verify

BACKENDS = [name for name, backend in OP.backends.items() if name != "reference" and not backend.absent()]
NATIVE = pytest.mark.skipif("native" not in BACKENDS, reason="no native code here")


def arguments(*sizes, options=(), dtype=torch.float64, cuts=None, grad=False):
    """Those of an example, its floating tensors in `dtype`."""
    return {
        name: value.detach().to(dtype).requires_grad_(grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in example(*sizes, *options, cuts=cuts).arguments.items()
    }


def differentiable(values):
    return [value for value in values.values() if isinstance(value, torch.Tensor) and value.requires_grad]


def results(values, backend, **rest):
    """Both outputs and every gradient."""
    y, h = OP(**values, backend=backend, **rest)
    return [y, h, *torch.autograd.grad((y * y.detach()).sum() + (h * h.detach()).sum(), differentiable(values))]


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_example_equals_the_float64_reference_with_all_gradients(backend, dtype):
    for finding in verify(OP, [backend], dtypes=[dtype], devices=["cpu"]):
        assert finding.status == "passed", str(finding)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_it_passes_gradcheck(backend):
    values = arguments(2, 18, 3, 2, options=OPTIONS, grad=True)
    values["dt"] = values["dt"].detach().clamp(min=-5).requires_grad_()  # no finite difference at -inf
    names = [name for name, value in values.items() if value is not None and value is not True]
    names.remove("reset")

    def scan(*tensors):
        return OP(**(values | dict(zip(names, tensors, strict=True))), backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(values[name] for name in names), fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_token_without_a_step_holds_the_state_exactly(backend):
    for options, hold in (((), 0.0), (("softplus",), -torch.inf)):
        values = arguments(2, 20, 5, 3, options=("state", *options), dtype=torch.float32)
        values["dt"] = torch.full_like(values["dt"], hold)
        assert torch.equal(OP(**values, backend=backend)[1], values["initial_state"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_and_decays_beyond_all_reason_are_right(backend):
    values = arguments(1, 20, 24, 6, options=("state",), dtype=torch.float32)
    values["dt"][:, 3] *= 1e4
    values["dt"][:, 7] = 1e9
    values["dt"][:, 12] = 1e-12
    values["A"][:, 2] = -1e13
    values["A"][:, 4] = -1e-9
    expected = reference.selective_scan(**values)
    for one, other in zip(OP(**values, backend=backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_growth_is_right_and_its_overflow_shows(backend):
    values = arguments(1, 20, 20, 5, options=("state",), dtype=torch.float32)
    values["A"] = values["A"].abs().clamp(0.1, 1)
    values["dt"] = values["dt"].clamp(max=1)
    for one, other in zip(OP(**values, backend=backend), reference.selective_scan(**values), strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    values["dt"] = values["dt"].new_full(values["dt"].shape, 200)
    assert not OP(**values, backend=backend)[1].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_ends_at_a_reset(backend):
    values = arguments(3, 40, 20, 5, options=("state", "z"), grad=True)
    values["reset"] = torch.zeros(3, 40, dtype=torch.bool)
    values["reset"][2, 20] = True
    clean = results(values, backend)
    for name in ("x", "initial_state"):
        spoilt = dict(values)
        spoilt[name] = values[name].detach().clone()
        spoilt[name][1:, 0] = torch.nan
        spoilt[name].requires_grad_()
        y, h = OP(**spoilt, backend=backend)
        assert y[1].isnan().any() and h[1].isnan().any()
        torch.testing.assert_close(y[0], clean[0][0])
        torch.testing.assert_close(y[2, 20:], clean[0][2, 20:])
        torch.testing.assert_close(h[::2], clean[1][::2])
        weight = torch.zeros_like(y)
        weight[2, 20:] = 1
        (ddt,) = torch.autograd.grad(y, spoilt["dt"], weight)
        assert ddt[2, 20:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_anywhere_it_is_the_same(backend):
    values = arguments(2, 50, 20, 16, options=("D", "z", "softplus", "state"))
    y, last = OP(**values, backend=backend)
    h, parts = values["initial_state"], []
    for piece in (slice(0, 1), slice(1, 18), slice(18, 18), slice(18, 50)):
        cut = {name: values[name][:, piece] for name in ("x", "dt", "B", "C", "z")}
        part, h = OP(**(values | cut | {"initial_state": h}), backend=backend)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y)
    torch.testing.assert_close(h, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_of_float64_is_not_rounded(backend):
    values = arguments(1, 3, 5, 3, options=("state",), dtype=torch.float32)
    values["initial_state"] = values["initial_state"].double()
    y, h = OP(**values, backend=backend)
    assert (y.dtype, h.dtype) == (torch.float32, torch.float64)


@NATIVE
def test_threads_change_nothing_but_the_order_of_sums_over_channels():
    values = arguments(2, 150, 203, 16, options=OPTIONS, dtype=torch.float32, grad=True)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            assert native._threads(values["x"], values["A"]) == threads
            found.append(results(values, "native"))
    finally:
        torch.set_num_threads(before)
    assert_close(found[1], found[0], 1e-4)
    assert_close(found[3], found[0], 1e-4)
    assert all(torch.equal(one, other) for one, other in zip(found[1], found[2], strict=True))


@NATIVE
def test_states_are_kept_for_gradients_only_and_few(monkeypatch):
    values = arguments(2, 64, 20, 4, dtype=torch.float32, grad=True)
    tensors = [values[name].detach() for name in ("x", "dt", "A", "B", "C")] + [None] * 6
    assert native.FORWARD(*tensors, False, False)[2].numel() == 0
    # One in 16 tokens, and one for each sequence's last, shorter chunk; channels rounded up to 32.
    assert native.FORWARD(*tensors, False, True)[2].shape == (2 * 64 // 16 + 2, 32 * 4)
    asked = []
    forward = native.FORWARD
    monkeypatch.setattr(native, "FORWARD", lambda *args: asked.append(args[-1]) or forward(*args))
    OP(**values, backend="native")
    with torch.no_grad():
        y, h = OP(**values, backend="native")
    OP(**arguments(2, 64, 20, 4), backend="native")
    assert asked == [True, False, False]
    assert not y.requires_grad and not h.requires_grad


@NATIVE
@pytest.mark.parametrize("cuts", [None, [0, 4, 4, 20]])
def test_torch_finds_its_registration_in_order(cuts):
    values = arguments(1, 20, 5, 3, options=OPTIONS, cuts=cuts, dtype=torch.float32)
    values["dt"] = values["dt"].clamp(min=-20)
    order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "reset", "cu_seqlens", "softplus")
    inputs = [values[name] for name in order]
    for some in (inputs, inputs[:5] + [None] * 4 + inputs[9:]):
        # Kept states have room for more than is filled: what is compared must not depend on it.
        torch.library.opcheck(native.FORWARD.op, (*some, False))
        y, h, kept = native.FORWARD(*some, True)
        gradients = (*some[:8], *some[9:], kept, y, h)
        torch.library.opcheck(native.BACKWARD.op, gradients)


@NATIVE
def test_it_compiles_into_one_graph_for_every_length():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def scan(**values):
        return selective_scan(**values)

    compiled = torch.compile(scan, fullgraph=True, backend=counter)
    for length in (20, 33, 47, 50):
        values = arguments(2, length, 18, 4, options=OPTIONS, grad=True)
        y, h = compiled(**values)
        found = [y, h, *torch.autograd.grad((y * y).sum() + (h * h).sum(), differentiable(values))]
        y, h = OP(**values, backend="reference")
        expected = [y, h, *torch.autograd.grad((y * y).sum() + (h * h).sum(), differentiable(values))]
        assert_close(found, expected, 1e-9)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_what_does_not_fit_is_refused_in_words():
    values = arguments(2, 6, 5, 3, options=OPTIONS)
    wrong = {
        "dt": (torch.ones(2, 6, 4), "dt has shape"),
        "A": (torch.ones(3, 5), "A has shape"),
        "C": (torch.ones(2, 6, 4), "C has shape"),
        "D": (torch.ones(2, 5), "D has shape"),
        "z": (torch.ones(2, 5, 5), "z has shape"),
        "dt_bias": (torch.ones(1), "dt_bias has shape"),
        "B": (torch.ones(2, 6, 3, dtype=torch.int64), "B has dtype"),
        "initial_state": (torch.ones(1, 5, 3), "initial_state has shape"),
        "reset": (torch.ones(2, 6), "reset has dtype"),
        "cu_seqlens": (torch.tensor([0, 6]), "a packed batch has one row"),
    }
    for name, (value, words) in wrong.items():
        with pytest.raises(KernelError, match=words):
            selective_scan(**(values | {name: value}))


@NATIVE
def test_bounds_out_of_bounds_are_refused_in_a_compiled_graph_too():
    values = arguments(1, 20, 5, 3, cuts=[0, 4, 20], dtype=torch.float32)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="eager")
    compiled(**values)
    with pytest.raises(KernelError, match="does not rise from 0 to the 20 tokens"):
        compiled(**(values | {"cu_seqlens": torch.tensor([0, 4, 2000])}))
    torch._dynamo.reset()


def test_native_code_declines_what_is_not_on_the_cpu():
    values = {name: value.to("meta") for name, value in arguments(1, 2, 3, 2).items() if torch.is_tensor(value)}
    assert "meta" in native.unavailable(**values)
    y, h = selective_scan(**values)
    assert (y.shape, h.shape) == ((1, 2, 3), (1, 3, 2))


def test_workloads_are_calls():
    work = workload("cpu", 1, 4, 32)
    assert work.flops > 0 and work.bytes(torch.bfloat16) < work.bytes(torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        y, _ = selective_scan(**work.arguments(torch.device("cpu"), dtype))
        assert y.dtype == dtype and y.requires_grad


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A stand-in for the package: the documented signature and layout, with time last, over the reference."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        per_token = [value for value in (u, delta, B, C, z) if value is not None]
        weights = [value for value in (A, D, delta_bias) if value is not None]
        assert {value.dtype for value in per_token} == {u.dtype}
        assert {value.dtype for value in weights} == {torch.float32}
        assert u.shape == delta.shape and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
        z = None if z is None else z.mT
        y, h = reference.selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z, delta_bias, softplus=delta_softplus)
        return (y.mT, h) if return_last_state else y.mT

    module = ModuleType(vendor.THEIRS[0])
    module.selective_scan_fn, module.selective_scan_cuda = selective_scan_fn, object()
    monkeypatch.setitem(sys.modules, vendor.THEIRS[0], module)
    for parent in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    vendor.load.cache_clear()
    yield module
    vendor.load.cache_clear()


def on_cuda(values):
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device="cuda") if torch.is_tensor(value) else value
        for name, value in values.items()
    }


def test_mamba_ssm_gets_its_own_layout(mamba_ssm):
    for options in ((), ("D", "z", "dt_bias", "softplus")):
        values = arguments(2, 9, 6, 4, options=options, dtype=torch.float32)
        assert_close(vendor.selective_scan(**values), reference.selective_scan(**values), 1e-6)
    # Per token one dtype: that of dt, which is kept in float32, and not that of x.
    values["x"], values["z"] = values["x"].bfloat16(), values["z"].bfloat16()
    assert_close(vendor.selective_scan(**values), reference.selective_scan(**values), 1e-2)
    assert vendor.selective_scan(**values)[0].dtype == torch.bfloat16


def test_mamba_ssm_trains_through_y_and_refuses_to_through_its_last_state(mamba_ssm):
    values = arguments(2, 9, 6, 4, dtype=torch.float32)
    values["x"] = values["x"].detach().requires_grad_()
    y, h = vendor.selective_scan(**values)
    (found,) = torch.autograd.grad(y.sum(), values["x"], retain_graph=True)
    (expected,) = torch.autograd.grad(reference.selective_scan(**values)[0].sum(), values["x"])
    assert_close((found,), (expected,), 1e-5)
    with pytest.raises(KernelError, match="no gradient of the last state"):
        torch.autograd.grad(y.sum() + h.sum(), values["x"])


def test_mamba_ssm_declines_what_it_cannot_do(mamba_ssm):
    assert "mamba-ssm's kernels run on CUDA" in vendor.unavailable(**arguments(1, 4, 3, 2))
    with FakeTensorMode():
        values = on_cuda(arguments(1, 4, 3, 2, dtype=torch.float32))
        assert vendor.unavailable(**values) is None

        def reason(**other):
            return vendor.unavailable(**(values | other))

        assert "no initial state" in reason(initial_state=torch.ones(1, 3, 2, device="cuda"))
        assert "no reset" in reason(reset=torch.ones(1, 4, dtype=torch.bool, device="cuda"))
        assert "no packed batch" in reason(cu_seqlens=torch.ones(2, dtype=torch.int64, device="cuda"))
        assert "float64" in reason(D=torch.ones(3, dtype=torch.float64, device="cuda"))
        assert "no tokens" in reason(x=torch.ones(1, 0, 3, device="cuda"))
        assert "257 states" in reason(A=torch.ones(3, 257, device="cuda"))


def test_a_broken_mamba_ssm_is_a_reason_and_not_an_error(mamba_ssm, monkeypatch):
    def reason():
        vendor.load.cache_clear()
        with FakeTensorMode():
            return vendor.unavailable(**on_cuda(arguments(1, 4, 3, 2, dtype=torch.float32)))

    mamba_ssm.selective_scan_cuda = None
    assert "built without its CUDA extension" in reason()
    monkeypatch.setitem(sys.modules, vendor.THEIRS[0], None)
    assert "importing mamba_ssm.ops.selective_scan_interface fails: ModuleNotFoundError" in reason()
