"""The diagonal state space: every backend equals the reference, whatever it is given and however it is called."""

from __future__ import annotations

import pytest
import torch
from altx_s4.kernels.diagonal_ssm import OP, diagonal_ssm, native, reference
from altx_s4.kernels.diagonal_ssm.cases import FORMS, example, workload
from torch._dynamo.testing import CompileCounterWithBackend

from altx_kernels import KernelError
from altx_kernels.verify import TOLERANCES, verify

BACKENDS = [name for name, backend in OP.backends.items() if name != "reference" and not backend.absent()]
NATIVE = pytest.mark.skipif("native" not in BACKENDS, reason="no native code here")


def arguments(form, *sizes, options=(), dtype=torch.float64, grad=False):
    """Those of an example, its floating tensors in `dtype`."""
    return {
        name: value.detach().to(dtype).requires_grad_(grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in example(form, *sizes, *options).arguments.items()
    }


def differentiable(values):
    return [value for value in values.values() if isinstance(value, torch.Tensor) and value.requires_grad]


def results(values, backend):
    """Both outputs and every gradient."""
    y, h = OP(**values, backend=backend)
    return [y, h, *torch.autograd.grad((y * y.detach()).sum() + (h * h.detach()).sum(), differentiable(values))]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_example_equals_the_float64_reference_with_all_gradients(backend, dtype):
    for finding in verify(OP, [backend], dtypes=[dtype], devices=["cpu"]):
        assert finding.status == "passed", str(finding)


def test_the_reference_is_a_recurrence_of_complex_numbers():
    values = arguments("low-rank", 1, 6, 1, 2, options=("D", "state"))
    rate, c, b, w, v, h = (
        [complex(*z) for z in values[name][..., :, :].reshape(2, 2).T.tolist()]
        for name in ("rate", "c", "b", "w", "v", "initial_state")
    )
    y, last = reference.diagonal_ssm(**values)
    for t, x in enumerate(values["x"][0, :, 0].tolist()):
        joined = sum((v[n] * h[n]).real for n in range(2))
        h = [(1 + rate[n]) * h[n] + b[n] * x - w[n] * joined for n in range(2)]
        expected = sum((c[n] * h[n]).real for n in range(2)) + values["D"].item() * x
        assert y[0, t, 0].item() == pytest.approx(expected, rel=1e-12)
    assert last[0, 0].T.flatten().tolist() == pytest.approx([part for z in h for part in (z.real, z.imag)], rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_it_passes_gradcheck(backend, form):
    skip = () if form == "complex" else ("D",)
    values = arguments(form, 2, 18, 3, 2, options=(*skip, "state", "reset", "lengths"), grad=True)
    names = [name for name, value in values.items() if isinstance(value, torch.Tensor) and value.requires_grad]

    def run(*tensors):
        return OP(**(values | dict(zip(names, tensors, strict=True))), backend=backend)

    assert torch.autograd.gradcheck(run, tuple(values[name] for name in names), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_split_anywhere_it_is_the_same(backend, form):
    values = arguments(form, 2, 150, 20, 3, options=("state", "reset"))
    y, last = OP(**values, backend=backend)
    h, parts = values["initial_state"], []
    for piece in (slice(0, 1), slice(1, 70), slice(70, 70), slice(70, 150)):
        cut = {name: values[name][:, piece] for name in ("x", "reset")}
        part, h = OP(**(values | cut | {"initial_state": h}), backend=backend)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, atol=1e-12, rtol=0)
    torch.testing.assert_close(h, last, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_a_token_keeps_its_state_exactly(backend, tokens):
    for form in FORMS:
        values = arguments(form, 2, tokens, 5, 3, options=("state", "reset"), dtype=torch.float32)
        values["lengths"] = torch.tensor([0, tokens])
        y, h = OP(**values, backend=backend)
        assert torch.equal(h[0], values["initial_state"][0]) and not y[0].any()
        assert not torch.equal(h[1], values["initial_state"][1]) and y[1].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_a_rows_length_is_never_looked_at(backend):
    for form in FORMS:
        values = arguments(form, 3, 40, 5, 3, options=("state", "lengths"), grad=True)
        clean = results(values, backend)
        spoilt = values["x"].detach().clone()
        for row, length in enumerate(values["lengths"].tolist()):
            spoilt[row, length:] = torch.nan
        for one, other in zip(results(values | {"x": spoilt.requires_grad_()}, backend), clean, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_ends_at_a_reset(backend):
    for form in FORMS:
        values = arguments(form, 3, 40, 20, 5, options=("state",), grad=True)
        values["reset"] = torch.zeros(3, 40, dtype=torch.bool)
        values["reset"][2, 20] = True
        clean = results(values, backend)
        for name in ("x", "initial_state"):
            spoilt = values[name].detach().clone()
            spoilt[1:, 0] = torch.nan
            y, h = OP(**(values | {name: spoilt}), backend=backend)
            assert y[1].isnan().any() and h[1].isnan().any()
            torch.testing.assert_close(y[0], clean[0][0])
            torch.testing.assert_close(y[2, 20:], clean[0][2, 20:])
            torch.testing.assert_close(h[::2], clean[1][::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slow_state_keeps_its_digits_over_many_tokens(backend):
    """What 1 + rate rounds away would be a hundredth of what a state forgets."""
    tokens, rate = 4096, torch.tensor([-1e-5, 1e-4], dtype=torch.float64).reshape(1, 2, 1)
    values = {"x": torch.ones(1, tokens, 1), "rate": rate.float(), "c": torch.tensor([1.0, 0.0]).reshape(1, 2, 1)}
    y, _ = OP(**values, backend=backend)
    re, im = rate.float().double().flatten()
    powers = (1 + torch.complex(re, im)) ** torch.arange(tokens)
    torch.testing.assert_close(y[0, :, 0].double(), powers.cumsum(0).real, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_of_float64_is_not_rounded(backend):
    values = arguments("real", 1, 3, 5, 3, options=("state",), dtype=torch.float32)
    values["initial_state"] = values["initial_state"].double()
    y, h = OP(**values, backend=backend)
    assert (y.dtype, h.dtype) == (torch.float32, torch.float64)


@NATIVE
def test_threads_change_nothing():
    before = torch.get_num_threads()
    for form in FORMS:
        values = arguments(form, 2, 300, 203, 16, options=("state", "lengths"), dtype=torch.float32, grad=True)
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert native._threads(values["x"], values["rate"]) == threads
                found.append(results(values, "native"))
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@NATIVE
def test_states_are_kept_for_gradients_only_and_few(monkeypatch):
    values = arguments("real", 2, 64, 20, 4, dtype=torch.float32, grad=True)
    tensors = [values[name].detach() for name in ("x", "rate", "c")] + [None] * 7
    assert native.FORWARD(*tensors, False)[2].numel() == 0
    # One in 32 tokens; channels rounded up to 32.
    assert native.FORWARD(*tensors, True)[2].shape == (2 * 64 // 32, 32 * 2 * 4)
    asked = []
    forward = native.FORWARD
    monkeypatch.setattr(native, "FORWARD", lambda *args: asked.append(args[-1]) or forward(*args))
    OP(**values, backend="native")
    with torch.no_grad():
        OP(**values, backend="native")
    OP(**arguments("real", 2, 64, 20, 4), backend="native")
    assert asked == [True, False, False]


@NATIVE
def test_halves_of_a_projection_are_read_where_they_lie():
    x = torch.randn(2, 5, 12)
    for part in (x.chunk(2, -1)[1], x[:1, 2:, 3:], x.unflatten(-1, (2, 6))):
        rows, stride, plane = native._rows(part)
        assert rows is part and stride == 12 and plane == (6 if part.dim() == 4 else 0)
    assert native._rows(x.mT)[0] is not x.mT and native._rows(x.mT)[1] == 5
    assert native._rows(x[:, 1:])[0].is_contiguous()  # rows of a batch that do not follow one another


@NATIVE
@pytest.mark.parametrize("form", FORMS)
def test_torch_finds_its_registration_in_order(form):
    values = arguments(form, 2, 20, 5, 3, options=("state", "reset", "lengths"), dtype=torch.float32)
    order = ("x", "rate", "c", "b", "w", "v", "D", "initial_state", "reset", "lengths")
    inputs = [values[name] for name in order]
    torch.library.opcheck(native.FORWARD.op, (*inputs, False))
    y, h, kept = native.FORWARD(*inputs, True)
    torch.library.opcheck(native.BACKWARD.op, (*inputs[:7], *inputs[8:], kept, y, h))


@NATIVE
@pytest.mark.parametrize("form", FORMS)
def test_it_compiles_into_one_graph_for_every_length(form):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def run(**values):
        return diagonal_ssm(**values)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for length in (20, 33, 47, 50):
        values = arguments(form, 2, length, 18, 4, options=("state", "reset", "lengths"), grad=True)
        y, h = compiled(**values)
        found = [y, h, *torch.autograd.grad((y * y).sum() + (h * h).sum(), differentiable(values))]
        y, h = OP(**values, backend="reference")
        expected = [y, h, *torch.autograd.grad((y * y).sum() + (h * h).sum(), differentiable(values))]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_what_does_not_fit_is_refused_in_words():
    values = arguments("low-rank", 2, 6, 5, 3, options=("D", "state", "reset", "lengths"))
    wrong = {
        "rate": (torch.ones(5, 3, 2), "rate has shape"),
        "c": (torch.ones(5, 2, 4), "c has shape"),
        "b": (None, "w and v without the others"),
        "v": (torch.ones(4, 2, 3), "v has shape"),
        "D": (torch.ones(2, 5), "D has shape"),
        "w": (torch.ones(5, 2, 3, dtype=torch.int64), "w has dtype"),
        "initial_state": (torch.ones(1, 5, 2, 3), "initial_state has shape"),
        "reset": (torch.ones(2, 6), "reset has dtype"),
        "lengths": (torch.ones(2), "lengths has dtype"),
        "x": (torch.ones(2, 6, 2, 5), "with a complex x"),
    }
    for name, (value, words) in wrong.items():
        with pytest.raises(KernelError, match=words):
            diagonal_ssm(**(values | {name: value}))


def test_native_code_declines_what_is_not_on_the_cpu():
    values = {name: z.to("meta") for name, z in arguments("real", 1, 2, 3, 2).items() if torch.is_tensor(z)}
    assert "meta" in native.unavailable(**values)
    y, h = diagonal_ssm(**values)
    assert (y.shape, h.shape) == ((1, 2, 3), (1, 3, 2, 2))


@pytest.mark.parametrize("form", FORMS)
def test_workloads_are_calls(form):
    work = workload("cpu", form, 1, 4, 32, 3)
    assert work.flops > 0 and work.bytes(torch.bfloat16) < work.bytes(torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        y, _ = diagonal_ssm(**work.arguments(torch.device("cpu"), dtype))
        assert y.dtype == dtype and y.requires_grad
