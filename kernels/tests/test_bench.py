"""Timings are taken in turns, within a budget, beside floors, and nothing is left out silently."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from altx_kernels import Backend, Op, op
from altx_kernels import bench as module
from altx_kernels.bench import Timing, bench, measure_rates
from altx_kernels.examples import Workload

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(op, "_ops", {})
    monkeypatch.setattr(module, "measure_rates", lambda device, dtype: module.Rates(1e9, 1e9))
    monkeypatch.setattr(module, "MOST_ROUNDS", 5)
    monkeypatch.setattr(module, "SAMPLE", 0.0)


def square(x: Tensor) -> Tensor:
    return x * x


def workload(label: str = "D=8", grad: bool = True, device: str = "cpu") -> Workload:
    return Workload(
        label,
        lambda device, dtype: {"x": torch.ones(8, device=device, dtype=dtype, requires_grad=grad)},
        bytes=lambda dtype: 16.0 * dtype.itemsize,
        flops=8.0,
        device=device,
    )


def run(*backends: Backend[Any], workloads: tuple[Workload, ...] = (), **options: Any) -> list[Timing]:
    loads = workloads or (workload(),)
    square_op = Op("square", square, backends or (Backend("mine", square),), workloads=lambda: loads)
    return list(bench([square_op], devices=["cpu"], **{"seconds": 5.0, **options}))


def test_every_mode_is_timed_with_its_spread_and_its_floor():
    forward, both = run()
    assert [(t.op, t.workload, t.device, t.dtype, t.backend) for t in (forward, both)] == [
        ("square", "D=8", "cpu", "float32", "mine")
    ] * 2
    assert (forward.mode, both.mode) == ("forward", "forward+backward")
    for timing in (forward, both):
        assert timing.rounds == 5
        assert 0 < timing.low <= timing.median <= timing.high
        assert timing.to_floor == timing.median / timing.floor
        assert (timing.to_fastest, timing.note) == (1, "")
    assert (forward.floor, forward.bound) == (64e-9, "bytes"), "64 bytes at 1 GB/s take longer than 8 operations"
    assert both.floor == pytest.approx(3 * forward.floor)


def test_the_larger_floor_counts():
    heavy = Workload("D=8", workload().arguments, bytes=lambda dtype: 1.0, flops=500.0)
    forward = run(workloads=(heavy,))[0]
    assert (forward.floor, forward.bound) == (500e-9, "flops")


def test_the_floors_are_measured():
    rates = measure_rates(CPU, torch.float32)
    assert 1e8 < rates.bytes < 1e14
    assert 1e8 < rates.flops < 1e16


def test_backends_take_turns():
    calls: list[str] = []

    def named(name: str) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            calls.append(name)
            return x * x

        return fn

    timings = run(Backend("a", named("a")), Backend("b", named("b")), workloads=(workload(grad=False),))
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 5, "two calls each to warm up, then in turns"
    assert min(timing.to_fastest for timing in timings) == 1


def test_gradients_are_taken_in_one_mode_alone():
    seen = []

    def fn(x: Tensor) -> Tensor:
        y = x * x
        seen.append(y.requires_grad)
        return y

    run(Backend("mine", fn))
    assert seen == [False] * 7 + [True] * 7


def test_a_workload_without_gradients_is_timed_forward_alone():
    assert [timing.mode for timing in run(workloads=(workload(grad=False),))] == ["forward"]


def test_the_reference_is_timed_when_asked_for():
    assert {t.backend for t in run()} == {"mine"}
    module_op = Op("cube", square, workloads=lambda: [workload()])
    timings = bench([module_op], devices=["cpu"], include_reference=True)
    assert {t.backend for t in timings} == {"reference"}
    assert {t.backend for t in bench([module_op], ["reference"], devices=["cpu"])} == {"reference"}


def test_a_backend_that_cannot_run_says_why():
    def crash(x: Tensor) -> Tensor:
        raise ValueError("boom")

    absent = Backend("absent", square, absent=lambda: "not installed")
    refuses = Backend("refuses", square, lambda x: "no gradients" if torch.is_grad_enabled() else None)
    timings = run(absent, refuses, Backend("crash", crash), Backend("mine", square))
    notes = {(t.mode, t.backend): t.note for t in timings}
    assert notes["forward", "absent"] == notes["forward+backward", "absent"] == "not installed"
    assert (notes["forward", "refuses"], notes["forward+backward", "refuses"]) == ("", "no gradients")
    assert notes["forward", "crash"] == "it fails: ValueError: boom"
    assert all((t.median is None) == bool(t.note) for t in timings)
    assert notes["forward", "mine"] == ""


def test_what_is_too_slow_is_cut_off_and_says_so():
    calls = []

    def slow(x: Tensor) -> Tensor:
        calls.append(x)
        time.sleep(0.2)
        return x * x

    timings = {(t.mode, t.backend): t for t in run(Backend("slow", slow), Backend("mine", square), seconds=0.3)}
    assert timings["forward", "slow"].rounds == 1
    assert timings["forward", "slow"].median >= 0.2
    assert timings["forward", "slow"].note.startswith("cut off after one call")
    assert timings["forward+backward", "slow"].median is None
    assert timings["forward+backward", "slow"].note.startswith("not run: forward alone takes 0.")
    assert timings["forward", "mine"].median < 0.1
    assert len(calls) == 1


def test_workloads_for_another_device_are_left_out():
    timings = run(workloads=(workload("small"), workload("large", device="cuda"), workload("any", device="")))
    assert {timing.workload for timing in timings} == {"small", "any"}


def test_threads_are_set_and_set_back():
    seen = []
    before = torch.get_num_threads()
    run(Backend("mine", lambda x: (seen.append(torch.get_num_threads()), x * x)[1]), threads=2)
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def test_the_dtype_is_the_workloads():
    assert {timing.dtype for timing in run(dtypes=[torch.bfloat16, torch.float64])} == {"bfloat16", "float64"}
