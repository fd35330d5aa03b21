"""Ops: numerical primitives with a reference and faster backends, chosen call by call.

    scan = Op("scan", reference=scan_reference, backends=[Backend("torch", scan_chunked)])
    y = scan(x)                      # the first backend that can run this call, or the reference
    y = scan(x, backend="reference") # this one or an error

The variable ALTX_KERNEL pins without touching code: `ALTX_KERNEL=torch` for every op that has such a
backend, `ALTX_KERNEL=scan=reference,conv=torch` op by op. What is pinned runs or fails with the reason;
it is never replaced by something else. Never imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from altx_kernels.examples import Example, Workload

VARIABLE = "ALTX_KERNEL"
REFERENCE = "reference"

Result = TypeVar("Result")


class KernelError(RuntimeError):
    """An op or one of its backends cannot do what was asked.

    Args:
        what: what is wrong, naming the op, the backend and the reason.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(f"{what}\n{hint}" if hint else what)
        self.what = what
        self.hint = hint


def available(*args: Any, **kwargs: Any) -> str | None:
    """No reason against: what a backend's `absent` and `unavailable` are where it runs everywhere, and any call."""
    return None


@dataclass(frozen=True)
class Backend(Generic[Result]):
    """One implementation of an op.

    Args:
        name: "torch", "native", "triton", or a library's name.
        fn: takes what the reference takes and returns what it returns.
        unavailable: given a call's arguments, the reason in words why `fn` cannot run it, or None. It looks
            at device, dtype, shape and whether gradients are wanted, never at values.
        absent: why it cannot run anything on this machine (no compiler, no GPU, not installed), or None.
    """

    name: str
    fn: Callable[..., Result]
    unavailable: Callable[..., str | None] = available
    absent: Callable[[], str | None] = available

    def reason(self, *args: Any, **kwargs: Any) -> str | None:
        """Why it cannot run a call here, or None."""
        return self.absent() or self.unavailable(*args, **kwargs)


@dataclass(frozen=True)
class Choice:
    """Which backend an op chose for a call.

    Args:
        op: name of the op.
        backend: name of the backend.
        refused: why those before it in order could not run the call, by name; empty when pinned.
        pin: what pinned the backend, or "".
    """

    op: str
    backend: str
    refused: Mapping[str, str] = field(default_factory=dict)
    pin: str = ""

    def __str__(self) -> str:
        reasons = [f"{name}: {reason}" for name, reason in self.refused.items()]
        notes = "; ".join([f"pinned by {self.pin}"] * bool(self.pin) + reasons)
        return f"{self.op}: {self.backend}" + (f" ({notes})" if notes else "")


class Op(Generic[Result]):
    """A numerical primitive.

    Args:
        name: short name, unique in the process.
        reference: plain PyTorch that runs any call, in float64 too; the backend "reference", always last.
        backends: in the order in which they are tried.
        check: given a call's arguments, raises KernelError where they do not fit together, before any backend is asked.
            An op without one is called through a function that checks.
        summary: one line for `altx kernels list`.
        examples: calls to verify the backends with; see `altx_kernels.examples`.
        workloads: calls to time the backends with; see `altx_kernels.examples`.

    Raises:
        KernelError: if two ops or two backends have one name.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Result],
        backends: Iterable[Backend[Result]] = (),
        *,
        check: Callable[..., None] = available,  # type: ignore[assignment]  # no reason against, whatever is passed
        summary: str = "",
        examples: Callable[[], Iterable[Example]] = tuple,
        workloads: Callable[[], Iterable[Workload]] = tuple,
    ) -> None:
        declared = [*backends, Backend(REFERENCE, reference)]
        self.name = name
        self.check = check
        self.summary = summary
        self.examples = examples
        self.workloads = workloads
        self.reference = reference
        self.backends: Mapping[str, Backend[Result]] = MappingProxyType({b.name: b for b in declared})
        if len(self.backends) < len(declared):
            raise KernelError(f"op {name!r} has two backends of one name: {', '.join(b.name for b in declared)}")
        if name in _ops:
            raise KernelError(f"there are two ops {name!r}", hint="give one of them another name")
        _ops[name] = self

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Result:
        """Run the op with the chosen backend; see `choose`."""
        self.check(*args, **kwargs)
        if backend is None and not _recorders and not os.environ.get(VARIABLE):
            # What `choose` would, with nothing to tell anybody: a step of decoding is short.
            transform = _transform()
            for candidate in self.backends.values():
                if (transform is None or candidate.name == REFERENCE) and candidate.reason(*args, **kwargs) is None:
                    return candidate.fn(*args, **kwargs)
        choice = self.choose(*args, backend=backend, **kwargs)
        for choices in _recorders:
            if choice not in choices:
                choices.append(choice)
        return self.backends[choice.backend].fn(*args, **kwargs)

    def choose(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Choice:
        """The backend for a call: the pinned one, else the first in order that can run it.

        Args:
            backend: pins one by name, whatever ALTX_KERNEL says.

        Raises:
            KernelError: if the pinned one is unknown or cannot run the call, or ALTX_KERNEL cannot be read.
        """
        if backend is not None:
            return self._pinned(backend, f"backend={backend!r}", args, kwargs)
        if (text := os.environ.get(VARIABLE)) and (name := self._pin(text)):
            return self._pinned(name, f"{VARIABLE}={text}", args, kwargs)
        refused: dict[str, str] = {}
        for candidate in self.backends.values():
            reason = self._reason(candidate, args, kwargs)
            if reason is None:
                return Choice(self.name, candidate.name, refused)
            refused[candidate.name] = reason
        raise AssertionError("the reference is always available")

    def _pinned(self, name: str, pin: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
        if name not in self.backends:
            raise KernelError(
                f"{pin}: op {self.name!r} has no backend {name!r}", hint=f"it has {', '.join(self.backends)}"
            )
        if reason := self._reason(self.backends[name], args, kwargs):
            raise KernelError(
                f"{pin}: backend {name!r} cannot run this call of op {self.name!r}: {reason}",
                hint="leave the pin out to have another backend chosen",
            )
        return Choice(self.name, name, pin=pin)

    def _reason(self, backend: Backend[Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why a backend of this op cannot run a call here and now, or None."""
        transform = None if backend.name == REFERENCE else _transform()
        return transform or backend.reason(*args, **kwargs)

    def _pin(self, text: str) -> str | None:
        """The backend that ALTX_KERNEL asks of this op, or None."""
        everywhere, by_op = parse_pins(text)
        if self.name in by_op:
            return by_op[self.name]
        if everywhere and not any(everywhere in op.backends for op in _ops.values()):
            known = dict.fromkeys(name for op in _ops.values() for name in op.backends)
            raise KernelError(
                f"{VARIABLE}={text}: no op has a backend {everywhere!r}", hint=f"there are {', '.join(known)}"
            )
        return everywhere if everywhere in self.backends else None


def parse_pins(text: str) -> tuple[str, dict[str, str]]:
    """Read ALTX_KERNEL: the backend for all ops ("" if none), and those for single ops by op.

    Raises:
        KernelError: if it cannot be read.
    """
    everywhere, by_op = "", dict[str, str]()
    for item in text.split(","):
        op, equals, backend = (part.strip() for part in item.rpartition("="))
        if not backend or bool(equals) != bool(op) or "=" in op or op in by_op or (not op and everywhere):
            raise KernelError(
                f"{VARIABLE}={text}: cannot read {item.strip()!r}",
                hint="write one backend for all ops (torch), or op=backend pairs (scan=reference,conv=torch)",
            )
        if op:
            by_op[op] = backend
        else:
            everywhere = backend
    return everywhere, by_op


def _transform() -> str | None:
    """Why only plain PyTorch, which is the reference, can run a call now, or None.

    Kernels come with a gradient of their own, which reverse mode finds. torch.func does not look for it, and forward
    mode would take what it does not find for zero.
    """
    import torch

    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms see through PyTorch's own functions only"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives go through PyTorch's own functions only"
    return None


_ops: dict[str, Op[Any]] = {}
_recorders: list[list[Choice]] = []


def ops() -> Mapping[str, Op[Any]]:
    """Every op of the plugins imported so far, by name."""
    return MappingProxyType(_ops)


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect the different choices made inside the `with`, in the order in which they first occur."""
    choices: list[Choice] = []
    _recorders.append(choices)
    try:
        yield choices
    finally:
        # By identity: nested recorders may hold equal lists.
        _recorders[:] = [other for other in _recorders if other is not choices]
