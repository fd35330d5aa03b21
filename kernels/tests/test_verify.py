"""The verifier passes what is right, and fails what is wrong in exactly the way in which it is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from altx_kernels import Backend, KernelError, Op, op
from altx_kernels.examples import Example, randn
from altx_kernels.verify import Finding, outputs_and_gradients, relative_error, verify


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(op, "_ops", {})


def decay(x: Tensor, a: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = a h_{t-1} + x_t for x (B, T, D), a (D,): the reference of these tests."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.new_zeros(x.shape[0], x.shape[2], dtype=wide) if initial_state is None else initial_state.to(wide)
    hs = []
    for t in range(x.shape[1]):
        h = a.to(wide) * h + x[:, t].to(wide)
        hs.append(h)
    return (torch.stack(hs, 1) if hs else h[:, None][:, :0]).to(x.dtype), h


def examples() -> list[Example]:
    a = (randn(3).sigmoid()).detach().requires_grad_()
    return [
        Example("T=4", {"x": randn(2, 4, 3), "a": a, "initial_state": None}),
        Example("T=5 state", {"x": randn(2, 5, 3), "a": a, "initial_state": randn(2, 3, seed=2)}),
        Example("T=0", {"x": randn(2, 0, 3), "a": a, "initial_state": randn(2, 3)}),
    ]


def check(
    fn: Callable[..., Any], unavailable: Callable[..., str | None] | None = None, **options: Any
) -> list[Finding]:
    """Findings about a backend of the op above."""
    backend = Backend("mine", fn, *([unavailable] if unavailable else []))
    return list(verify(Op("decay", decay, [backend], examples=examples), ["mine"], devices=["cpu"], **options))


def only(fn: Callable[..., Any], dtype: torch.dtype = torch.float64, **options: Any) -> Finding:
    (finding,) = check(fn, dtypes=[dtype], **options)
    return finding


def wrong(finding: Finding) -> set[str]:
    return {failure.what for failure in finding.failures}


def test_what_is_right_passes_in_every_dtype():
    findings = check(decay)
    assert [f.dtype for f in findings] == ["float64", "float32", "bfloat16", "float16"]
    for finding in findings:
        assert finding.status == "passed", finding
        assert finding.calls == 3 * 3 * 2, "every example in every layout, with and without gradients"
        assert finding.error <= finding.tolerance
    assert findings[0].error == 0
    assert findings[2].error > 1e-3, "bfloat16 rounds the output"
    assert findings[2].worst


def test_the_reference_in_low_precision_is_verified_too():
    findings = list(verify(Op("decay", decay, examples=examples)))
    assert {(f.backend, f.status) for f in findings if f.device == "cpu"} == {("reference", "passed")}


def test_the_reference_runs_once_for_an_example_and_a_dtype():
    calls = []

    def counted(**arguments):
        calls.append(arguments)
        return decay(**arguments)

    backends = [Backend("one", decay), Backend("two", decay)]
    list(verify(Op("decay", counted, backends, examples=examples), ["one", "two"], dtypes=[torch.float32]))
    assert len(calls) == 3
    assert all(arguments["x"].dtype == torch.float64 for arguments in calls)


def test_a_wrong_output():
    finding = only(lambda *args, **kwargs: (lambda y, h: (y * 1.001, h))(*decay(*args, **kwargs)))
    assert wrong(finding) == {"output[0]", "gradient of x", "gradient of a", "gradient of initial_state"}
    assert {f.example for f in finding.failures if f.what == "output[0]"} == {
        "T=4", "T=4 (no grad)", "T=5 state", "T=5 state (no grad)",
    }  # fmt: skip
    assert "1.0e-03 > 1e-10" in str(finding) or "0.001 > 1e-10" in str(finding)


def test_a_wrong_gradient_alone():
    def fn(x, a, initial_state=None):
        return decay(x, a + 0.01 * (a - a.detach()), initial_state)

    assert wrong(only(fn)) == {"gradient of a"}


def test_the_final_states_gradient_is_wanted():
    def fn(*args, **kwargs):
        y, h = decay(*args, **kwargs)
        return y, h.detach()

    finding = only(fn)
    assert wrong(finding) == {"gradient of x", "gradient of a", "gradient of initial_state"}
    assert "T=0" in {failure.example for failure in finding.failures}


@pytest.mark.parametrize("lost", ["sliced", "transposed"])
def test_wrong_for_inputs_that_are_not_contiguous(lost):
    def fn(x, a, initial_state=None):
        row_is_apart = x.stride(-1) == 1
        affected = not x.is_contiguous() and row_is_apart == (lost == "sliced")
        if affected and x.numel():
            x = x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))
        return decay(x, a, initial_state)

    finding = only(fn)
    assert finding.failures
    assert {failure.layout for failure in finding.failures} == {lost}


def test_a_gradient_that_does_not_lie_contiguously():
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone(memory_format=torch.contiguous_format)

        @staticmethod
        def backward(ctx, gradient):
            return gradient.as_strided(gradient.shape, torch.empty(gradient.shape).stride())

    def fn(x, a, initial_state=None):
        y, h = decay(x, a, initial_state)
        return Careless.apply(y), h

    finding = only(fn)
    assert {failure.layout for failure in finding.failures} == {"sliced", "transposed"}
    assert "output[0]" not in wrong(finding)


def test_too_coarse_for_one_dtype():
    def fn(x, a, initial_state=None):
        y, h = decay(x, a, initial_state)
        return (y.to(torch.float16).to(y.dtype), h)

    statuses = {finding.dtype: finding.status for finding in check(fn)}
    assert statuses == {"float64": "failed", "float32": "failed", "bfloat16": "passed", "float16": "passed"}


def test_too_coarse_for_bfloat16_alone():
    def fn(x, a, initial_state=None):
        y, h = decay(x, a, initial_state)
        return (y * (1.1 if y.dtype == torch.bfloat16 else 1)), h

    statuses = {finding.dtype: finding.status for finding in check(fn)}
    assert [dtype for dtype, status in statuses.items() if status == "failed"] == ["bfloat16"]


def test_an_input_that_is_written_to():
    def fn(x, a, initial_state=None):
        y, h = decay(x.clone(), a, initial_state)
        x.detach().zero_()
        return y, h

    finding = only(fn)
    assert wrong(finding) == {"argument x"}
    assert finding.failures[0].message == "it was written to"


def test_memory_beside_an_input_that_is_written_to():
    def fn(x, a, initial_state=None):
        y, h = decay(x, a, initial_state)
        if x.numel() and x.storage_offset():
            x.detach().as_strided((1,), (1,), 0).zero_()
        return y, h

    finding = only(fn)
    assert wrong(finding) == {"argument x"}
    assert {failure.layout for failure in finding.failures} == {"sliced"}


def test_nan_is_a_failure():
    def fn(x, a, initial_state=None):
        y, h = decay(x, a, initial_state)
        return y + math.nan, h

    finding = only(fn)
    assert wrong(finding) == {"output[0]"}, "adding NaN leaves the gradients right"
    assert math.isnan(finding.error)
    assert all(math.isnan(failure.error) for failure in finding.failures)


def test_numbers_that_are_no_numbers_have_to_be_the_same():
    nan, inf = math.nan, math.inf
    assert relative_error(torch.tensor([nan, inf, 2.0]), torch.tensor([nan, inf, 2.0])) == 0
    for other in ([0.0, inf, 2.0], [nan, -inf, 2.0], [nan, 3e38, 2.0], [nan, inf, nan]):
        assert math.isnan(relative_error(torch.tensor(other), torch.tensor([nan, inf, 2.0]))), other
    assert relative_error(torch.tensor([1e-3]), torch.tensor([0.0])) == pytest.approx(1e-3)


def test_a_state_below_float32():
    def fn(x, a, initial_state=None):
        y, h = decay(x, a, initial_state)
        return y, h.to(x.dtype)

    findings = {finding.dtype: finding for finding in check(fn)}
    assert findings["float32"].status == "passed"
    assert wrong(findings["bfloat16"]) == {"output[1]"}
    assert "a state is carried in float32 at least" in findings["bfloat16"].failures[0].message
    assert {failure.example for failure in findings["bfloat16"].failures} == {"T=4", "T=4 (no grad)"}


def test_an_output_in_another_dtype():
    def fn(x, a, initial_state=None):
        y, h = decay(x, a, initial_state)
        return y.float(), h

    finding = only(fn, torch.bfloat16)
    assert wrong(finding) == {"output[0]"}
    assert finding.failures[0].message == "it has dtype torch.float32, not torch.bfloat16"


@pytest.mark.parametrize(
    "fn, what, message",
    [
        (lambda **arguments: decay(**arguments)[:1], "output", "it is output[0], not output[0], output[1]"),
        (lambda **arguments: (decay(**arguments)[0].mT, decay(**arguments)[1]), "output[0]", "it has shape (2, 3, 4)"),
    ],
)
def test_outputs_of_another_form(fn, what, message):
    finding = only(fn, layouts=["contiguous"])
    assert finding.failures[0].what == what
    assert finding.failures[0].message.startswith(message)


def test_a_backend_that_refuses_is_skipped_with_its_reason():
    def unavailable(x, a, initial_state=None):
        if x.dtype != torch.float32:
            return f"no {x.dtype}"
        return "no state" if initial_state is not None else None

    findings = {finding.dtype: finding for finding in check(decay, unavailable)}
    assert findings["float64"].status == "skipped"
    assert findings["float64"].skipped == {"no torch.float64": 18}
    assert findings["float32"].status == "passed"
    assert (findings["float32"].calls, findings["float32"].skipped) == (6, {"no state": 12})


def test_a_backend_for_inference_alone_is_verified_for_inference():
    def unavailable(x, a, initial_state=None):
        return "no gradients" if x.requires_grad else None

    (finding,) = check(decay, unavailable, dtypes=[torch.float64])
    assert (finding.status, finding.calls, finding.skipped) == ("passed", 9, {"no gradients": 9})


def test_a_backend_that_is_absent_is_skipped_once():
    backend = Backend("mine", decay, absent=lambda: "not installed")
    (finding,) = verify(Op("decay", decay, [backend], examples=examples), ["mine"])
    assert (finding.status, finding.device, finding.skipped) == ("skipped", "", {"not installed": 3})


@pytest.mark.parametrize("where", ["fn", "unavailable"])
def test_a_crash_is_a_failure_with_its_message(where):
    def crash(x, a, initial_state=None):
        raise ValueError("boom\nsecond line")

    finding = only(crash) if where == "fn" else only(decay, unavailable=crash)
    assert wrong(finding) == {"call"}
    assert {failure.message for failure in finding.failures} == {"ValueError: boom"}
    assert len(finding.failures) == 18, "the first failure stops nothing"


def test_a_reference_that_crashes_is_a_failure():
    def crash(**arguments):
        raise ValueError("boom")

    (finding,) = verify(
        Op("decay", crash, [Backend("mine", decay)], examples=examples), ["mine"], dtypes=[torch.float64]
    )
    assert wrong(finding) == {"reference"}
    assert len(finding.failures) == 3


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_arguments_and_outputs_may_be_nested():
    def swap(pair, both):
        return {"out": Pair(pair.right * both[0], pair.left.double())}

    def wrong_swap(pair, both):
        return {"out": Pair(pair.right.detach() * both[0], pair.left.double())}

    def calls():
        return [Example("pair", {"pair": Pair(randn(3, 1), randn(3, 2)), "both": (randn(1), 4)})]

    right, bad = verify(
        Op("swap", swap, [Backend("right", swap), Backend("bad", wrong_swap)], examples=calls),
        ["right", "bad"],
        dtypes=[torch.float64],
        devices=["cpu"],
    )
    assert right.status == "passed", right
    assert wrong(bad) == {"gradient of pair.right"}


def test_an_op_without_examples_is_skipped():
    (finding,) = verify(Op("decay", decay))
    assert (finding.status, finding.skipped) == ("skipped", {"the op has no examples": 1})


def test_an_unknown_backend_is_an_error():
    with pytest.raises(KernelError, match="op 'decay' has no backend 'cuda'"):
        list(verify(Op("decay", decay, examples=examples), ["cuda"]))


def test_outputs_and_gradients_have_the_names_of_what_they_are_of():
    x, y = randn(3, seed=1), randn(3, seed=2)
    found = outputs_and_gradients(lambda x, y, n: (x * y[0], n), {"x": x, "y": [y], "n": torch.tensor([4])})
    assert list(found) == ["output[0]", "output[1]", "x", "y[0]"] and torch.equal(found["output[0]"], (x * y).detach())
    torch.testing.assert_close(found["x"] * x, found["y[0]"] * y)
    assert found["x"].all()
