"""Backends against the reference: outputs and gradients, in every dtype and memory layout, on every device.

    for finding in verify(selective_scan):
        assert finding.status != "failed", finding

What is expected comes from the reference in float64, run on the inputs as the dtype at hand rounds them, so that an
error is the backend's own. Every output is weighted with different random numbers before gradients are taken. Errors
are relative to the largest number expected in the same tensor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from altx_kernels.examples import Example, randn
from altx_kernels.op import REFERENCE, Backend, KernelError, Op
from altx_kernels.trees import leaves, map_floats, map_leaves

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def _contiguous(value: Tensor) -> tuple[Tensor, Tensor]:
    whole = value.clone(memory_format=torch.contiguous_format)
    return whole, whole


def _sliced(value: Tensor) -> tuple[Tensor, Tensor]:
    """Part of a wider tensor, as `x, z = xz.chunk(2, -1)` makes it; what is around it is NaN."""
    *outer, size = value.shape or (1,)
    filler = math.nan if value.is_floating_point() else 0
    whole = value.new_full((*outer, 2 * size + 3), filler)
    view = whole[..., 1 : size + 1] if value.dim() > 1 else whole[1 : 2 * size + 1 : 2]
    view = view if value.dim() else view[0]
    return view.copy_(value), whole


def _reversed(value: Tensor) -> tuple[Tensor, Tensor]:
    """The last axis lies outermost in memory, as after a transposition."""
    axes = tuple(reversed(range(value.dim())))
    whole = value.permute(axes).clone(memory_format=torch.contiguous_format)
    return whole.permute(axes), whole


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "contiguous": _contiguous,
    "sliced": _sliced,
    "transposed": _reversed,
}
"""By name: a copy of a tensor that lies differently in memory, and the memory around it."""


@dataclass(frozen=True)
class Failure:
    """One thing that a backend got wrong.

    Args:
        example: label of the example.
        layout: how its tensors lay in memory.
        what: "output[1]", "gradient of x", "argument x", or "call".
        message: what is wrong with it.
        error: relative error where that is what is wrong, else NaN.
    """

    example: str
    layout: str
    what: str
    message: str
    error: float = math.nan

    def __str__(self) -> str:
        return f"{self.example}, {self.layout}: {self.what}: {self.message}"


@dataclass
class Finding:
    """What became of one backend on one device in one dtype.

    Args:
        op: name of the op.
        backend: name of the backend, or "" if there was nothing to verify.
        device: "cpu", "cuda", or "" if the backend runs nothing on this machine.
        dtype: "float32", ..., or "".
        tolerance: the largest error allowed.
        calls: how many calls were compared.
        error: the largest relative error.
        worst: where it occurred.
        failures: everything that was wrong.
        skipped: why calls were not run, with their numbers.
        seconds: time it took.
    """

    op: str
    backend: str = ""
    device: str = ""
    dtype: str = ""
    tolerance: float = 0.0
    calls: int = 0
    error: float = 0.0
    worst: str = ""
    failures: list[Failure] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """ "passed", "failed", or "skipped" if no call was run."""
        return "failed" if self.failures else "passed" if self.calls else "skipped"

    def __str__(self) -> str:
        name = " ".join(filter(None, (self.op, self.backend, self.device, self.dtype)))
        reasons = [*map(str, self.failures), *self.skipped]
        return f"{name}: {self.status}" + "".join(f"\n  {reason}" for reason in reasons)


def verify(
    op: Op[Any],
    backends: Sequence[str] | None = None,
    *,
    dtypes: Iterable[torch.dtype] = tuple(TOLERANCES),
    layouts: Iterable[str] = tuple(LAYOUTS),
    devices: Iterable[str] | None = None,
) -> Iterator[Finding]:
    """Compare backends with the reference on every example of the op; never stops at the first failure.

    Args:
        op: its `examples` are the calls; each is run with and without gradients.
        backends: names of those to verify; default: all, the reference in lower precision included.
        dtypes: what floating arguments are rounded to.
        layouts: names in LAYOUTS.
        devices: default: "cpu", and "cuda" if there is one.

    Raises:
        KernelError: if the op lacks one of the backends.
    """
    if missing := [name for name in backends or () if name not in op.backends]:
        raise KernelError(f"op {op.name!r} has no backend {missing[0]!r}", hint=f"it has {', '.join(op.backends)}")
    examples = list(op.examples())
    if not examples:
        yield Finding(op.name, skipped={"the op has no examples": 1})
        return
    known: dict[tuple[int, torch.dtype], _Expected] = {}
    for name in backends or op.backends:
        backend = op.backends[name]
        if reason := backend.absent():
            yield Finding(op.name, name, skipped={reason: len(examples)})
            continue
        for device in devices or present_devices():
            for dtype in dtypes:
                yield _verify(op, backend, device, dtype, examples, tuple(layouts), known)


def present_devices() -> tuple[str, ...]:
    """The devices of this machine that ops run on."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _verify(
    op: Op[Any], backend: Backend[Any], device: str, dtype: torch.dtype, examples: list[Example],
    layouts: tuple[str, ...], known: dict[tuple[int, torch.dtype], _Expected],
) -> Finding:  # fmt: skip
    start = time.perf_counter()
    finding = Finding(op.name, backend.name, device, str(dtype).removeprefix("torch."), TOLERANCES[dtype])
    for index, example in enumerate(examples):
        try:
            if (index, dtype) not in known:
                known[index, dtype] = _Expected(op, example, dtype)
            expected = known[index, dtype]
        except Exception as error:
            finding.failures.append(Failure(example.label, "", REFERENCE, _in_words(error)))
            continue
        for layout in layouts:
            for gradients in (False, True):
                _Call(finding, backend, example, layout, gradients).compare(expected, device, dtype)
    finding.seconds = time.perf_counter() - start
    return finding


class _Expected:
    """The reference's outputs and gradients in float64, for inputs rounded to a dtype."""

    def __init__(self, op: Op[Any], example: Example, dtype: torch.dtype) -> None:
        arguments = map_floats(lambda name, value: value.to(dtype).double(), dict(example.arguments))
        self.outputs = leaves(op.reference(**arguments), "output")
        self.weights = {name: weight.to(dtype).double() for name, weight in _weights(self.outputs).items()}
        self.gradients = _differentiate(self.outputs, self.weights, arguments)
        self.outputs = {name: output.detach() for name, output in self.outputs.items()}


class _Call:
    """One call of a backend, compared with what is expected of it."""

    def __init__(self, finding: Finding, backend: Backend[Any], example: Example, layout: str, gradients: bool) -> None:
        self.finding = finding
        self.backend = backend
        self.example = example
        self.layout = layout
        self.gradients = gradients

    def compare(self, expected: _Expected, device: str, dtype: torch.dtype) -> None:
        """Run the call and add what it shows to the finding."""
        place = LAYOUTS[self.layout]
        wholes: dict[str, Tensor] = {}

        def argument(name: str, value: Tensor) -> Tensor:
            view, wholes[name] = place(value.detach().to(device, dtype if value.is_floating_point() else value.dtype))
            return view.detach().requires_grad_(self.gradients and value.requires_grad)

        arguments = map_leaves(argument, dict(self.example.arguments))
        before = {name: whole.clone() for name, whole in wholes.items()}
        try:
            with torch.set_grad_enabled(self.gradients):
                if reason := self.backend.reason(**arguments):
                    self.finding.skipped[reason] = self.finding.skipped.get(reason, 0) + 1
                    return
                self.finding.calls += 1
                outputs = leaves(self.backend.fn(**arguments), "output")
            self._outputs(outputs, expected, leaves(arguments), dtype)
            if self.gradients and list(outputs) == list(expected.outputs):
                weights = {name: place(weight.to(device))[0] for name, weight in expected.weights.items()}
                gradients = _differentiate(outputs, weights, arguments)
                for name, gradient in expected.gradients.items():
                    self._near(f"gradient of {name}", gradients[name], gradient)
        except Exception as error:
            self._fail("call", _in_words(error))
        for name, whole in wholes.items():
            if not torch.allclose(whole, before[name], rtol=0, atol=0, equal_nan=True):
                self._fail(f"argument {name}", "it was written to")

    def _outputs(
        self, outputs: dict[str, Tensor], expected: _Expected, arguments: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        if list(outputs) != list(expected.outputs):
            self._fail("output", f"it is {', '.join(outputs)}, not {', '.join(expected.outputs)}")
            return
        for index, (name, output) in enumerate(outputs.items()):
            error = self._near(name, output, expected.outputs[name])
            if not output.is_floating_point():
                continue
            if index == 0 and output.dtype != dtype:
                self._fail(name, f"it has dtype {output.dtype}, not {dtype}")
            # What is carried on must not lose what float32 keeps; copies, and states that came in so, lose nothing.
            came_so = any(a.shape == output.shape and a.dtype == output.dtype for a in arguments.values())
            if index and output.dtype.itemsize < 4 and error and not came_so:
                self._fail(name, f"it has dtype {output.dtype}; a state is carried in float32 at least")

    def _near(self, what: str, actual: Tensor, expected: Tensor) -> float:
        if actual.shape != expected.shape:
            self._fail(what, f"it has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
            return math.nan
        error = relative_error(actual, expected)
        if math.isnan(error) or error > self.finding.error:
            self.finding.error, self.finding.worst = error, f"{self._label()}, {self.layout}: {what}"
        if not error <= self.finding.tolerance:
            self._fail(what, f"{error:.2g} > {self.finding.tolerance:.0e}", error)
        return error

    def _label(self) -> str:
        return self.example.label + ("" if self.gradients else " (no grad)")

    def _fail(self, what: str, message: str, error: float = math.nan) -> None:
        self.finding.failures.append(Failure(self._label(), self.layout, what, message, error))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest number expected; NaN where numbers that are no numbers differ."""
    actual, expected = actual.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    finite = expected.isfinite()
    if not torch.allclose(actual[~finite], expected[~finite], equal_nan=True):
        return math.nan
    actual, expected = actual[finite], expected[finite]
    if not len(expected):
        return 0.0
    scale = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    return difference / scale if scale else difference


def outputs_and_gradients(fn: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a call returns, and the gradients of a weighted sum of it: what two backends have to agree in.

    Args:
        fn: an op, or one backend of it.
        arguments: by name; gradients are taken in those that require them.

    Returns:
        Tensors by name: those of the outputs begin with "output", gradients are named as their arguments.
    """
    outputs = leaves(fn(**arguments), "output")
    gradients = _differentiate(outputs, _weights(outputs), arguments)
    return {**{name: output.detach() for name, output in outputs.items()}, **gradients}


def _weights(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Different random numbers for every floating output."""
    return {
        name: randn(*output.shape, seed=1 + index, grad=False)
        for index, (name, output) in enumerate(outputs.items())
        if output.is_floating_point()
    }


def _differentiate(outputs: dict[str, Tensor], weights: dict[str, Tensor], arguments: Any) -> dict[str, Tensor]:
    """Gradients of the weighted sum of the outputs, by argument; zeros where there is none."""
    wanted = {name: value for name, value in leaves(arguments).items() if value.requires_grad}
    used = [name for name in weights if outputs[name].requires_grad]
    if not wanted or not used:
        return {name: torch.zeros_like(value) for name, value in wanted.items()}
    found = torch.autograd.grad(
        [outputs[name] for name in used],
        list(wanted.values()),
        [weights[name].to(outputs[name].dtype) for name in used],
        allow_unused=True,
    )
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(wanted.items(), found, strict=True)
    }


def _in_words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
