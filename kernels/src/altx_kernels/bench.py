"""Backends timed side by side, beside floors measured in the same run.

Calls of all backends take turns, so that load from elsewhere falls on all of them. A floor is the time that the
compulsory bytes take at the bandwidth of a copy, or the operations at the rate of a matrix product, whichever is
longer; both rates are measured here, in the same dtype and with as many threads. Training is counted as three times
the bytes and operations of the forward pass. What fits into a cache may beat the floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from altx_kernels.examples import Workload
from altx_kernels.op import REFERENCE, Backend, Op
from altx_kernels.trees import leaves
from altx_kernels.verify import present_devices

MODES = {"forward": 1.0, "forward+backward": 3.0}
"""What is timed, and how much of the forward pass's bytes and operations it costs."""

LEAST_ROUNDS = 3
MOST_ROUNDS = 50
SAMPLE = 2e-3
"""Seconds that one sample takes at least; short calls are repeated within it."""


@dataclass(frozen=True)
class Rates:
    """What a device reaches: bytes read and written per second by a copy, operations per second by a product."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Timing:
    """One backend on one workload.

    Args:
        op: name of the op.
        workload: its label.
        device: "cpu" or "cuda".
        dtype: "float32", ...
        mode: "forward" (under no_grad) or "forward+backward".
        backend: name of the backend.
        rounds: how many samples were taken.
        median: seconds per call, or None if it was not timed.
        low: first quartile of the samples. high: third quartile.
        floor: seconds at the measured rates. bound: "bytes" or "flops", whichever takes that long.
        to_floor: median relative to the floor. to_fastest: median relative to the fastest backend's.
        note: why it was not timed, or not as often as it should be.
    """

    op: str
    workload: str
    device: str
    dtype: str
    mode: str
    backend: str
    rounds: int = 0
    median: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float = 0.0
    bound: str = ""
    to_floor: float | None = None
    to_fastest: float | None = None
    note: str = ""


def bench(
    ops: Sequence[Op[Any]],
    backends: Sequence[str] | None = None,
    *,
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    devices: Iterable[str] | None = None,
    seconds: float = 60.0,
    threads: int | None = None,
    include_reference: bool = False,
) -> Iterator[Timing]:
    """Time the ops' workloads, each in both modes with every backend that can run it.

    Args:
        ops: what to time.
        backends: names of those to time; default: all but the reference.
        dtypes: of the floating arguments.
        devices: default: "cpu", and "cuda" if there is one.
        seconds: for everything; shared among the workloads. A call that has begun is not interrupted.
        threads: for the CPU; default: as many as torch uses.
        include_reference: time the reference too, which is a slow loop.

    Returns:
        The timings, workload by workload, with one for each backend that was left out and why.
    """
    deadline = time.perf_counter() + seconds
    cases = [
        (op, workload, torch.device(device), dtype)
        for device in devices or present_devices()
        for dtype in dtypes
        for op in ops
        for workload in op.workloads()
        if workload.device in ("", device)
    ]
    rates: dict[tuple[torch.device, torch.dtype], Rates] = {}
    with _threads(threads):
        for done, (op, workload, device, dtype) in enumerate(cases):
            if (device, dtype) not in rates:
                rates[device, dtype] = measure_rates(device, dtype)
            chosen = [
                backend
                for name, backend in op.backends.items()
                if (name in backends if backends else name != REFERENCE or include_reference)
            ]
            share = (deadline - time.perf_counter()) / (len(cases) - done)
            yield from _case(op, workload, device, dtype, chosen, rates[device, dtype], max(share, 0))


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of several copies and matrix products; other load only ever slows them."""
    large = device.type == "cuda"
    source = torch.ones((1 << 30 if large else 1 << 26) // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = min(_sample(lambda: target.copy_(source), device, 1) for _ in range(6))
    n = 4096 if large else 512
    a = torch.randn(n, n, device=device).to(dtype)
    product = min(_sample(lambda: a @ a, device, 2) for _ in range(6))
    return Rates(2 * source.nbytes / copy, 2 * n**3 / product)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _case(
    op: Op[Any], workload: Workload, device: torch.device, dtype: torch.dtype, backends: list[Backend[Any]],
    rates: Rates, seconds: float,
) -> Iterator[Timing]:  # fmt: skip
    """The modes of one workload, within its share of the time; one without gradients is timed forward alone."""
    deadline = time.perf_counter() + seconds
    arguments = workload.arguments(device, dtype)
    trained = any(value.requires_grad for value in leaves(dict(arguments)).values())
    modes = MODES if trained else {"forward": MODES["forward"]}
    costs = {"bytes": workload.bytes(dtype) / rates.bytes, "flops": workload.flops / rates.flops}
    bound = max(costs, key=lambda name: costs[name])
    slow: dict[str, float] = {}
    for done, (mode, factor) in enumerate(modes.items()):
        share = max(deadline - time.perf_counter(), 0) / (len(modes) - done)
        samples, notes = _rounds(backends, arguments, mode, device, share, slow)
        medians = {name: statistics.median(taken) for name, taken in samples.items()}
        fastest = min(medians.values(), default=0.0)
        floor = factor * costs[bound]
        for backend in backends:
            name = backend.name
            taken, median = samples.get(name, []), medians.get(name)
            low, _, high = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else [median] * 3
            yield Timing(
                op.name, workload.label, device.type, str(dtype).removeprefix("torch."), mode, name,
                len(taken), median, low, high, floor, bound,
                median / floor if median and floor else None, median / fastest if median and fastest else None,
                notes.get(name, ""),
            )  # fmt: skip


def _rounds(
    backends: list[Backend[Any]], arguments: Mapping[str, Any], mode: str, device: torch.device, seconds: float,
    slow: dict[str, float],
) -> tuple[dict[str, list[float]], dict[str, str]]:  # fmt: skip
    """Samples of each backend, taken in turns, and notes on those that got fewer or none.

    Args:
        slow: seconds of one call, by backend, in the modes before; receives those of this one.
    """
    samples: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    start = time.perf_counter()
    for place, backend in enumerate(backends):
        name = backend.name
        share = max(seconds - (time.perf_counter() - start), 0) / (len(backends) - place)
        if mode != "forward" and 2 * slow.get(name, 0) > share:
            notes[name] = f"not run: forward alone takes {slow[name]:.2g} s, and {share:.2g} s are left for it"
            continue
        try:
            with torch.set_grad_enabled(mode != "forward"):
                if reason := backend.reason(**arguments):
                    notes[name] = reason
                    continue
            call = _call(backend, arguments, mode)
            # The first call may compile, the second shows what a call takes.
            first = slow[name] = _sample(call, device, 1)
            if first <= share:
                slow[name] = _sample(call, device, 1)
        except Exception as error:
            notes[name] = f"it fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        if LEAST_ROUNDS * slow[name] > share:
            samples[name] = [slow[name]]
            notes[name] = f"cut off after one call: it has {share:.2g} s"
        else:
            samples[name] = []
            calls[name] = call, max(1, int(SAMPLE / max(slow[name], 1e-7)))
    for turn in range(MOST_ROUNDS if calls else 0):
        if turn >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, (call, repeats) in calls.items():
            samples[name].append(_sample(call, device, repeats))
    return samples, notes


def _call(backend: Backend[Any], arguments: Mapping[str, Any], mode: str) -> Callable[[], Any]:
    """One call of a backend, with its backward pass if the mode has one."""
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return backend.fn(**arguments)

        return forward
    wanted = [value for value in leaves(dict(arguments)).values() if value.requires_grad]
    weights: dict[str, Tensor] = {}

    def both() -> Any:
        found = leaves(backend.fn(**arguments), "output")
        outputs = {name: value for name, value in found.items() if value.requires_grad}
        for name, value in outputs.items():
            if name not in weights:
                weights[name] = torch.randn_like(value)
        return torch.autograd.grad(
            list(outputs.values()), wanted, [weights[name] for name in outputs], allow_unused=True
        )

    return both


def _sample(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
