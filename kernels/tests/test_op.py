"""An op runs the first backend that can run the call, or the pinned one, or fails with a reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from altx_kernels import Backend, Choice, KernelError, Op, op, ops, record


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(op, "_ops", {})
    monkeypatch.delenv("ALTX_KERNEL", raising=False)


def only_even(x):
    return None if x % 2 == 0 else f"{x} is odd"


def make(name="double", *backends):
    backends = backends or (
        Backend("native", lambda x: ("native", 2 * x), only_even),
        Backend("torch", lambda x: ("torch", x + x)),
    )
    return Op(name, reference=lambda x: ("reference", 2 * x), backends=backends)


def test_the_first_backend_that_can_run_the_call_runs_it():
    double = make()
    assert double(2) == ("native", 4)
    assert double(3) == ("torch", 6)


def test_without_a_backend_the_reference_runs():
    lonely = make("lonely", Backend("native", lambda x: 0, only_even))
    assert lonely(3) == ("reference", 6)


def test_backends_keep_their_order_and_the_reference_is_last():
    assert list(make().backends) == ["native", "torch", "reference"]


@pytest.mark.parametrize("name", ["native", "torch", "reference"])
def test_the_argument_pins(name):
    assert make()(4, backend=name) == (name, 8)


def test_a_pinned_backend_that_cannot_run_is_an_error_with_its_reason():
    with pytest.raises(KernelError, match="'native' cannot run this call of op 'double': 3 is odd") as info:
        make()(3, backend="native")
    assert info.value.hint


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones():
    with pytest.raises(KernelError, match="no backend 'cuda'") as info:
        make()(3, backend="cuda")
    assert info.value.hint == "it has native, torch, reference"


def test_the_variable_pins_every_op_that_has_the_backend(monkeypatch):
    double, other = make(), make("other", Backend("vendor", lambda x: ("vendor", x)))
    monkeypatch.setenv("ALTX_KERNEL", "torch")
    assert double(2) == ("torch", 4)
    assert other(2) == ("vendor", 2)


def test_the_variable_pins_op_by_op(monkeypatch):
    double, other, third = make(), make("other"), make("third")
    monkeypatch.setenv("ALTX_KERNEL", "double=reference, other=torch")
    assert [op(2)[0] for op in (double, other, third)] == ["reference", "torch", "native"]


def test_an_op_by_itself_goes_before_all_ops(monkeypatch):
    double, other = make(), make("other")
    monkeypatch.setenv("ALTX_KERNEL", "reference,other=torch")
    assert [op(2)[0] for op in (double, other)] == ["reference", "torch"]


def test_the_argument_goes_before_the_variable(monkeypatch):
    monkeypatch.setenv("ALTX_KERNEL", "reference")
    assert make()(2, backend="torch") == ("torch", 4)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("double=native", "3 is odd"),
        ("native", "3 is odd"),
        ("double=cuda", "no backend 'cuda'"),
        ("cuda", "no op has a backend 'cuda'"),
        ("torch,", "cannot read ''"),
        ("torch,native", "cannot read 'native'"),
        ("double=", "cannot read 'double='"),
        ("=torch", "cannot read '=torch'"),
        ("double=torch=native", "cannot read 'double=torch=native'"),
        ("double=torch,double=native", "cannot read 'double=native'"),
    ],
)
def test_a_variable_that_cannot_be_honoured_is_an_error_never_a_fallback(monkeypatch, text, reason):
    double = make()
    monkeypatch.setenv("ALTX_KERNEL", text)
    with pytest.raises(KernelError, match=reason) as info:
        double(3)
    assert f"ALTX_KERNEL={text}" in info.value.what and info.value.hint


def test_an_empty_variable_pins_nothing(monkeypatch):
    monkeypatch.setenv("ALTX_KERNEL", "")
    assert make()(2) == ("native", 4)


def test_record_collects_each_different_choice_once_with_the_refusals():
    double = make()
    with record() as outer:
        double(2)
        with record() as inner:
            double(3)
            double(3)
        double(2, backend="reference")
    double(5)
    assert inner == [Choice("double", "torch", {"native": "3 is odd"})]
    assert outer == [Choice("double", "native"), *inner, Choice("double", "reference", pin="backend='reference'")]
    assert str(inner[0]) == "double: torch (native: 3 is odd)"


def test_choosing_runs_nothing():
    def fail(x):
        raise AssertionError

    assert make("op", Backend("torch", fail)).choose(1).backend == "torch"


def test_ops_are_registered_by_name_and_cannot_be_changed_from_outside():
    double = make()
    assert ops() == {"double": double}
    with pytest.raises(TypeError):
        ops()["double"] = None


def test_names_are_unique():
    make()
    with pytest.raises(KernelError, match="two ops 'double'"):
        make()
    with pytest.raises(KernelError, match="two backends of one name"):
        make("other", Backend("reference", print))


def test_torch_is_not_imported():
    code = "import sys, altx_kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
