"""A subject made ready for checking: in float64, with parameters that hide nothing, and inputs to feed it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from altx.capabilities import Capabilities, split_plan
from altx.compose import build as build_model
from altx.config import TokensInput
from altx.context import Context
from altx.layer import Layer, Output
from altx.measure import example_inputs
from altx.memory import Memory
from altx.model import Model
from altx.resolve import Blueprint
from altx.router import Router
from altx.state import State
from altx.testing.trial import Trial

SEED = 20250


class Failure(AssertionError):
    """A law is broken in a way that no number describes.

    Args:
        what: the same for every input that breaks the law in this way.
        detail: what was seen with this one.
    """

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what)
        self.detail = detail


@dataclass(frozen=True)
class Subject:
    """Something to check.

    Args:
        name: for reports.
        build: makes a fresh layer (or model) on the CPU in float32.
        dim: width of its input.
        causal: the `ctx.causal` it is checked with.
        blueprint: a small model that contains it, or None.
        compose: what builds that model; a test of the kit may pass a wrong one.
        memory: makes the bare memory, if the subject is one.
        width: of what the bare memory is fed, where that is not `dim`.
        resized: the same of another width; raises ConfigError where that does not suit it.
        origin: the arguments of `altx.testing.example` that make it.
        command: the command that checks it.
    """

    name: str
    build: Callable[[], Layer | Model]
    dim: int = 16
    causal: bool = True
    blueprint: Blueprint | None = None
    compose: Callable[[Blueprint], Model] = build_model
    memory: Callable[[], Memory] | None = None
    width: int | None = None
    resized: Callable[[int], Subject] | None = None
    origin: str = "subject"
    command: str = ""


def agitate(module: nn.Module, seed: int = SEED) -> nn.Module:
    """Move every parameter away from its initial value, in place; a fresh initialisation hides real faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1.5 * parameter + (0.7 / fan_in**0.5) * noise)
    return module


class Case:
    """A subject, built, agitated and in float64.

    Args:
        subject: what to check.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def fresh(self, seed: int = SEED) -> Layer | Model:
        """The layer as built, in float32; the global generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.subject.build()

    @cached_property
    def layer(self) -> Any:
        """The layer to check, in float64; checks do not change it."""
        return agitate(copy.deepcopy(self.fresh()).double()).eval()

    @cached_property
    def memory(self) -> Memory:
        """The bare memory, in the same way."""
        assert self.subject.memory
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            memory = self.subject.memory().double()
        agitate(memory)
        return memory

    @property
    def capabilities(self) -> Capabilities:
        return self.layer.capabilities  # type: ignore[no-any-return]

    @property
    def ctx(self) -> Context:
        """The plain context the subject is checked with."""
        return Context(causal=self.subject.causal)

    @property
    def streams(self) -> bool:
        return self.subject.causal and self.per_token and self.capabilities.streaming != "none"

    @property
    def per_token(self) -> bool:
        """Whether there is an output for every token (a classifier has one per row)."""
        return not isinstance(self.layer, Model) or self.layer.config.head.kind != "classifier"

    @cached_property
    def unit(self) -> int:
        """Lengths that checks use are multiples of this."""
        c = self.capabilities
        return c.split_multiple if c.streaming == "chunk" and c.partial == "none" else 1

    @cached_property
    def chunk(self) -> int:
        """Tokens after which what every memory and router inside was told shows in later ones."""
        parts = [part for part in self.layer.modules() if isinstance(part, (Memory, Router))]
        return max((part.capabilities.chunk for part in parts), default=1)

    def inputs(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Random inputs (B, T, ...), different for every seed."""
        generator = torch.Generator().manual_seed(SEED + seed)
        if isinstance(self.layer, Model):
            return example_inputs(self.layer, batch, length, generator)
        return torch.randn(batch, length, self.subject.dim, generator=generator, dtype=torch.float64)

    def x(self, trial: Trial) -> Tensor:
        """The inputs of a trial; masked tokens hold something, too."""
        return self.inputs(trial.batch, trial.length)

    def told(self, trial: Trial) -> Tensor:
        """What the bare memory is fed."""
        width, generator = self.subject.width or self.subject.dim, torch.Generator().manual_seed(SEED)
        return torch.randn(trial.batch, trial.length, width, generator=generator, dtype=torch.float64)

    def context(self, trial: Trial) -> Context:
        """The context of a trial."""
        return self.ctx.replace(mask=trial.mask, reset=trial.reset)

    def other(self, x: Tensor) -> Tensor:
        """Inputs that differ from x at every token."""
        if x.is_floating_point():
            return x + 1 + x.abs()
        assert isinstance(self.layer, Model) and isinstance(self.layer.config.input, TokensInput)
        return (x + 1) % self.layer.config.input.vocab

    def state(self, batch: int, capacity: int | None = None, layer: Any = None) -> State:
        """The state before the first token, of the layer or of a copy of it."""
        state = (layer or self.layer).init_state(batch, capacity=capacity, dtype=torch.float64, device="cpu")
        if state is None:
            return State()
        if not isinstance(state, State):
            raise Failure(f"init_state returned a {type(state).__name__}, not an altx.state.State")
        return state

    @torch.no_grad()
    def run(self, x: Tensor, ctx: Context | None = None, state: State | None = None) -> Output:
        """One call, without gradients."""
        return checked(self.layer(x, ctx or self.ctx, state))

    def calls(self, lengths: Sequence[int]) -> list[int]:
        """Lengths of calls, cut further where the capabilities demand it."""
        if not self.streams:
            return list(lengths)
        cut: list[int] = []
        for length in lengths:
            cut += split_plan(sum(cut), length, self.capabilities)
        return cut

    def run_pieces(self, x: Tensor, lengths: Sequence[int], ctx: Context | None = None) -> tuple[Tensor, State]:
        """The same tokens in several calls."""
        ctx = ctx or self.ctx
        state, start, outputs = self.state(x.shape[0]), 0, []
        for length in self.calls(lengths):
            out = self.run(x[:, start : start + length], ctx.slice(start, start + length), state)
            state = self.carried(out, state)
            outputs.append(out.y)
            start += length
        return torch.cat(outputs, 1) if outputs else x, state

    def carried(self, out: Output, before: State) -> State:
        """The state to continue from; a layer that carries nothing may return none."""
        if out.state is not None:
            return out.state
        if self.capabilities.growth != "none":
            raise Failure("given a state, forward returned none")
        return before


def checked(out: Any) -> Output:
    """What a layer returned, if it is what the contract says.

    Raises:
        Failure: if it is not.
    """
    if not isinstance(out, Output):
        raise Failure(f"forward returned a {type(out).__name__}, not an altx.layer.Output")
    if not isinstance(out.y, Tensor):
        raise Failure(f"forward returned an Output whose y is a {type(out.y).__name__}, not a tensor")
    if out.state is not None and not isinstance(out.state, State):
        raise Failure(f"forward returned a state that is a {type(out.state).__name__}, not an altx.state.State")
    return out


class Gap(float):
    """The largest difference of two tensors, which knows what they are.

    Args:
        value: the difference.
        label: what they are: "y", or "state." and the name of a leaf.
        found, wanted: the tensors.
    """

    label: str
    found: Tensor
    wanted: Tensor

    def __new__(cls, value: float, label: str, found: Tensor, wanted: Tensor) -> Gap:
        gap = super().__new__(cls, value)
        gap.label, gap.found, gap.wanted = label, found, wanted
        return gap

    def first(self, tolerance: float) -> str:
        """Where they begin to differ by more than is allowed, in words."""
        found, wanted = self.found.detach(), self.wanted.detach()
        if found.shape != wanted.shape:
            return f"{self.label} is {tuple(found.shape)}, expected {tuple(wanted.shape)}"
        allowed = tolerance * max(1.0, float(wanted.abs().max()))
        wrong = ~((found.double() - wanted.double()).abs() <= allowed)
        place = wrong.nonzero()[0].tolist()
        a, b = found[tuple(place)].item(), wanted[tuple(place)].item()
        digits = next((d for d in (4, 7, 17) if f"{a:.{d}g}" != f"{b:.{d}g}"), 17)
        return (
            f"{self.label} at {place} is {a:.{digits}g}, expected {b:.{digits}g} (apart by {abs(a - b):.2g});"
            f" {int(wrong.sum())} of {wrong.numel()} numbers differ"
        )


def difference(a: Tensor, b: Tensor, label: str = "y") -> Gap:
    """Largest difference, relative to the largest value where that exceeds 1; infinite for unequal shapes or NaN."""
    if a.shape != b.shape:
        return Gap(float("inf"), label, a, b)
    if not a.numel():
        return Gap(0.0, label, a, b)
    if not a.is_floating_point():
        return Gap(0.0 if torch.equal(a, b) else float("inf"), label, a, b)
    one, other = a.detach().double(), b.detach().double()
    worst = float((one - other).abs().max() / other.abs().max().clamp(min=1))
    return Gap(worst if worst == worst else float("inf"), label, a, b)


def state_difference(a: State, b: State, label: str = "state") -> Gap:
    """Largest difference between two states. Slots of a cache that hold no token do not count."""
    nothing = torch.zeros(0)
    worst = Gap(0.0, label, nothing, nothing)
    if (
        a.leaves.keys() != b.leaves.keys()
        or a.children.keys() != b.children.keys()
        or (a.seen is None) != (b.seen is None)
    ):
        return Gap(float("inf"), f"{label} (its structure)", nothing, nothing)
    for name, leaf in a.spec.items():
        left, right = a[name], b[name]
        if leaf.seq_dim is not None and a.seen is not None and b.seen is not None and len(a.seen):
            used = int(torch.maximum(a.seen, b.seen).max())
            left, right = (t.narrow(leaf.seq_dim, 0, min(used, t.shape[leaf.seq_dim])) for t in (left, right))
        worst = max(worst, difference(left, right, f"{label}.{name}"))
    if a.seen is not None and b.seen is not None:
        worst = max(worst, difference(a.seen, b.seen, f"{label}.seen"))
    below = (state_difference(child, b.children[name], f"{label}.{name}") for name, child in a.children.items())
    return max([worst, *below])
