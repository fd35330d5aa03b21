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
from altx.state import State

SEED = 20250


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
    """

    name: str
    build: Callable[[], Layer | Model]
    dim: int = 16
    causal: bool = True
    blueprint: Blueprint | None = None
    compose: Callable[[Blueprint], Model] = build_model
    memory: Callable[[], Memory] | None = None
    width: int | None = None


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
        """Tokens after which every memory inside has written what it was told, so that later ones can read it."""
        return max((part.capabilities.chunk for part in self.layer.modules() if isinstance(part, Memory)), default=1)

    def inputs(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Random inputs (B, T, ...), different for every seed."""
        generator = torch.Generator().manual_seed(SEED + seed)
        if isinstance(self.layer, Model):
            return example_inputs(self.layer, batch, length, generator)
        return torch.randn(batch, length, self.subject.dim, generator=generator, dtype=torch.float64)

    def other(self, x: Tensor) -> Tensor:
        """Inputs that differ from x at every token."""
        if x.is_floating_point():
            return x + 1 + x.abs()
        assert isinstance(self.layer, Model) and isinstance(self.layer.config.input, TokensInput)
        return (x + 1) % self.layer.config.input.vocab

    def state(self, batch: int, capacity: int | None = None, layer: Any = None) -> State:
        """The state before the first token, of the layer or of a copy of it."""
        state = (layer or self.layer).init_state(batch, capacity=capacity, dtype=torch.float64, device="cpu")
        return State() if state is None else state

    @torch.no_grad()
    def run(self, x: Tensor, ctx: Context | None = None, state: State | None = None) -> Output:
        """One call, without gradients."""
        out: Output = self.layer(x, ctx or self.ctx, state)
        return out

    def run_pieces(self, x: Tensor, lengths: Sequence[int], ctx: Context | None = None) -> tuple[Tensor, State]:
        """The same tokens in several calls, cut further where the capabilities demand it."""
        ctx = ctx or self.ctx
        state, start, outputs = self.state(x.shape[0]), 0, []
        for wanted in lengths:
            for length in split_plan(start, wanted, self.capabilities):
                out = self.run(x[:, start : start + length], ctx.slice(start, start + length), state)
                state = self.carried(out, state)
                outputs.append(out.y)
                start += length
        return torch.cat(outputs, 1), state

    def carried(self, out: Output, before: State) -> State:
        """The state to continue from; a layer that carries nothing may return none."""
        if out.state is not None:
            return out.state
        if self.capabilities.growth != "none":
            raise AssertionError("given a state, it returned none")
        return before


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value where that exceeds 1; infinite for unequal shapes or NaN."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.detach().double(), b.detach().double()
    worst = float((a - b).abs().max() / b.abs().max().clamp(min=1))
    return worst if worst == worst else float("inf")


def state_difference(a: State, b: State) -> float:
    """Largest difference between two states. Slots of a cache that hold no token do not count."""
    if a.leaves.keys() != b.leaves.keys() or a.children.keys() != b.children.keys():
        return float("inf")
    worst = 0.0
    for name, leaf in a.spec.items():
        left, right = a[name], b[name]
        if leaf.seq_dim is not None and a.seen is not None and b.seen is not None and len(a.seen):
            used = int(torch.maximum(a.seen, b.seen).max())
            left, right = (t.narrow(leaf.seq_dim, 0, min(used, t.shape[leaf.seq_dim])) for t in (left, right))
        worst = max(worst, difference(left, right))
    if (a.seen is None) != (b.seen is None):
        return float("inf")
    if a.seen is not None and b.seen is not None:
        worst = max(worst, difference(a.seen, b.seen))
    return max([worst, *(state_difference(child, b.children[name]) for name, child in a.children.items())])


def padded(x: Tensor, mask: Tensor, filling: Tensor) -> Tensor:
    """x (B, T, ...) spread over the True places of mask (B, S), `filling` (B, S, ...) elsewhere."""
    out = filling.clone()
    out[mask] = x.reshape(-1, *x.shape[2:])
    return out
