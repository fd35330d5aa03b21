"""How a memory becomes part of a layer. The block around it owns the norm n and the residual.

residual:    y = mixer(n(x)) + memory(n(x))
gate:        y = mixer(n(x)) * sigmoid(W memory(n(x)))
controller:  token by token, h_t = mixer(W [n(x_t); r_{t-1}]), r_t = memory(h_t), y_t = h_t + r_t
kv:          y = mixer(n(x)), an attention whose softmax takes in what the memory holds for each query
context:     y = mixer(n(x)), which attends across to what was read: for its chunk, or for each token
tokens:      around all blocks, see `altx.segment_loop`
ffn:         y = memory(n(x)), where the feed-forward would stand
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from altx.capabilities import meet
from altx.context import Context, Cross
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output, StateOptions, scoped
from altx.memory import Attended, Chunk, Memory, Scan, added, put_back
from altx.state import Leaf, State


class MemoryLayer(Layer):
    """A memory in a slot of its own: y = memory(x)."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.capabilities = meet([memory.capabilities])

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State:
        return State(children={"memory": self.memory.init_state(batch, **options)})

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        scan, value = read_value(self.memory, x, ctx, state)
        return Output(
            value,
            State(children={"memory": scan.state}) if state else None,
            scoped("memory", scan.losses),
            scoped("memory", scan.metrics),
        )


def read_value(memory: Memory, x: Tensor, ctx: Context, state: State | None) -> tuple[Scan, Tensor]:
    """Scan x (B, T, D) with the "memory" child of a state, or afresh: the scan and its values (B, T, D)."""
    inner = state.children["memory"] if state else memory.init_state(x.shape[0], device=x.device, dtype=x.dtype)
    scan = memory.scan(x, inner, ctx)
    if scan.read.value is None:
        raise TypeError(f"{type(memory).__name__} reads no value, so it cannot be attached this way")
    return scan, scan.read.value


class _Attached(Layer):
    """A mixer with a memory."""

    def __init__(self, mixer: Layer, memory: Memory) -> None:
        super().__init__()
        self.mixer = mixer
        self.memory = memory
        self.capabilities = meet([mixer.capabilities, memory.capabilities])

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State:
        mixer = self.mixer.init_state(batch, **options)
        # A memory may have no parameters of its own to say where its state belongs.
        weight = next(self.parameters(), None)
        if weight is not None:
            options = {
                **options,
                "device": options.get("device") or weight.device,
                "dtype": options.get("dtype") or weight.dtype,
            }
        memory = self.memory.init_state(batch, **options)
        return State(children={"memory": memory} if mixer is None else {"mixer": mixer, "memory": memory})

    def output(self, y: Tensor, mixed: Output, scan: Scan, state: State | None) -> Output:
        """y, with all else that came of a call of each, which `state` had led into."""
        children = {"memory": scan.state} if mixed.state is None else {"mixer": mixed.state, "memory": scan.state}
        return Output(
            y,
            State(children=children) if state else None,
            {**scoped("mixer", mixed.losses), **scoped("memory", scan.losses)},
            {**scoped("mixer", mixed.metrics), **scoped("memory", scan.metrics)},
            mixed.exports,
        )


class _Beside(_Attached):
    """The two hear the same x, and their outputs are joined."""

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        mixed = self.mixer(x, ctx, state.child("mixer") if state else None)
        scan, value = read_value(self.memory, x, ctx, state)
        return self.output(self.join(mixed.y, value), mixed, scan, state)

    @abstractmethod
    def join(self, mixed: Tensor, value: Tensor) -> Tensor:
        """One branch from the mixer's output and the memory's value, both (B, T, D)."""


class ResidualAttach(_Beside):
    """y = mixer(x) + memory(x)."""

    def join(self, mixed: Tensor, value: Tensor) -> Tensor:
        return mixed + value


class GateAttach(_Beside):
    """y = mixer(x) * sigmoid(W memory(x)); Titans' memory as gate (Behrouz et al. 2024, section 4.2)."""

    def __init__(self, mixer: Layer, memory: Memory, dim: int) -> None:
        super().__init__(mixer, memory)
        self.gate = nn.Linear(dim, dim)

    def join(self, mixed: Tensor, value: Tensor) -> Tensor:
        return mixed * torch.sigmoid(self.gate(value))


class KVAttach(_Attached):
    """The memory's keys and values take part in the mixer's softmax (Wu et al. 2022, arXiv:2203.08913, section 3.1).

    The mixer hands its own queries, keys and values to the memory, as they are before any position turns them: what
    is far away is found by content.
    """

    def __init__(self, mixer: Layer, memory: Memory) -> None:
        super().__init__(mixer, memory)
        self.capabilities = replace(self.capabilities, accepts_kv=False, cross=False)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        held = state.children["memory"] if state else None
        scans: list[Scan] = []

        def recall(q: Tensor, k: Tensor, v: Tensor, here: Context) -> Attended:
            before = held or self.memory.init_state(q.shape[0], device=q.device, dtype=q.dtype)
            tokens = torch.cat([t.flatten(2) for t in (q, k, v)], -1)
            scan = self.memory.scan(tokens, before, here)
            scans.append(scan)
            if scan.read.attended is None:
                raise TypeError(f"{type(self.memory).__name__} has no keys and values, so it cannot be attached as kv")
            return scan.read.attended

        mixed = self.mixer(x, ctx.replace(recall=recall), state.child("mixer") if state else None)
        if len(scans) != bool(x.shape[1]):
            raise TypeError(f"{type(self.mixer).__name__} accepts_kv, and asked {len(scans)} times for them in a call")
        children = {} if mixed.state is None else {"mixer": mixed.state}
        after = scans[0].state if scans else held
        return Output(
            mixed.y,
            State(children={**children, "memory": after}) if state and after else None,
            {**scoped("mixer", mixed.losses), **(scoped("memory", scans[0].losses) if scans else {})},
            {**scoped("mixer", mixed.metrics), **(scoped("memory", scans[0].metrics) if scans else {})},
            mixed.exports,
        )


class ContextAttach(_Attached):
    """The mixer attends across to what is read: `ctx.cross` holds the tokens for a chunk, or each token's own value.

    A memory with chunks gives tokens for each. One without gives each token a value, or tokens, which stand before
    that token alone in the mixer's softmax, so that no token sees what a later one has asked. In Titans' Memory as a
    Context (Behrouz et al. 2024, section 4.1) the tokens of a segment see each other's.
    """

    def __init__(self, mixer: Layer, memory: Memory) -> None:
        super().__init__(mixer, memory)
        self.capabilities = replace(self.capabilities, cross=False)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.cross is not None:
            raise UnsupportedContext("ctx.cross is taken: the mixer attends across to its memory")
        start = state or self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        mixer, held = start.child("mixer"), start.children["memory"]
        if self.memory.capabilities.chunk == 1:
            scan = self.memory.scan(x, held, ctx)
            mixed = self.mixer(x, ctx.replace(cross=Cross(self._own(scan, x.shape[1]))), mixer)
            return self.output(mixed.y, mixed, scan, state)
        chunks: list[Chunk] = []
        ys: list[Tensor] = []
        exports: dict[str, list[Tensor]] = {}
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for chunk in self.memory.chunks(x, held, ctx):
            if chunk.read.tokens is None:
                raise TypeError(f"{type(self.memory).__name__} reads no tokens, so it cannot be attached as context")
            mixed = self.mixer(chunk.x, chunk.ctx.replace(cross=Cross(chunk.read.tokens)), mixer)
            mixer, held = mixed.state, chunk.state
            chunks.append(chunk)
            ys.append(mixed.y)
            for name, value in mixed.exports.items():
                exports.setdefault(name, []).append(value)
            added(losses, scoped("memory", chunk.losses))
            for into, part in ((losses, mixed.losses), (metrics, mixed.metrics)):
                added(into, {name: value * chunk.share for name, value in scoped("mixer", part).items()})
        after = (
            State(children={"memory": held} if mixer is None else {"mixer": mixer, "memory": held}) if state else None
        )
        if not chunks:
            return Output(torch.zeros_like(x), after)
        whole = {name: put_back(chunks, each, x) for name, each in exports.items()}
        return Output(put_back(chunks, ys, x), after, losses, metrics, whole)

    def _own(self, scan: Scan, length: int) -> Tensor:
        """(B, T, M, D), what each of T tokens has read."""
        value, tokens = scan.read.value, scan.read.tokens
        if tokens is not None:
            return tokens.unflatten(1, (length, -1)) if length else tokens[:, None][:, :0]
        if value is None:
            raise TypeError(f"{type(self.memory).__name__} reads nothing that could be attached as context")
        return value[:, :, None]


class ControllerAttach(_Attached):
    """The mixer controls the memory and hears what it read (Graves et al. 2014, section 3).

    Sequential in T: each token's input to the mixer holds the read of the token before.
    """

    def __init__(self, mixer: Layer, memory: Memory, dim: int) -> None:
        super().__init__(mixer, memory)
        self.input = nn.Linear(2 * dim, dim)
        self.initial_read = nn.Parameter(torch.zeros(dim))

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State:
        read = torch.tanh(self.initial_read).to(device=options.get("device"), dtype=options.get("dtype"))
        inner = super().init_state(batch, **options)
        return State({"read": read.expand(batch, -1)}, {"read": Leaf()}, inner.children)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        start = state or self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        read, children = start["read"], dict(start.children)
        initial = torch.tanh(self.initial_read).to(read.dtype)
        outputs: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        exports: dict[str, list[Tensor]] = {}
        for t in range(x.shape[1]):
            here = ctx.slice(t, t + 1)
            if here.reset is not None:
                read = torch.where(here.reset & _real(here, x), initial, read)
            mixed = self.mixer(self.input(torch.cat([x[:, t : t + 1], read[:, None]], -1)), here, children.get("mixer"))
            scan, value = read_value(self.memory, mixed.y, here, State(children=children))
            outputs.append(mixed.y + value)
            for name, exported in mixed.exports.items():
                exports.setdefault(name, []).append(exported)
            read = value[:, 0] if here.mask is None else torch.where(here.mask, value[:, 0], read)
            children["memory"] = scan.state
            if mixed.state is not None:
                children["mixer"] = mixed.state
            share = here.share_of(ctx, x[:, t : t + 1], x)
            for into, part in (
                (losses, {**scoped("mixer", mixed.losses), **scoped("memory", scan.losses)}),
                (metrics, {**scoped("mixer", mixed.metrics), **scoped("memory", scan.metrics)}),
            ):
                for name, value in part.items():
                    into[name] = into.get(name, torch.zeros_like(value)) + value * share
        after = State({"read": read}, start.spec, children) if state else None
        if not outputs:
            return Output(x, after, losses, metrics, self.mixer(x, ctx, children.get("mixer")).exports)
        whole = {name: torch.cat(each, 1) for name, each in exports.items()}
        return Output(torch.cat(outputs, 1), after, losses, metrics, whole)


def _real(ctx: Context, x: Tensor) -> Tensor:
    """(B, 1) bool: whether the one token of this context is real."""
    return ctx.mask if ctx.mask is not None else torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device)
