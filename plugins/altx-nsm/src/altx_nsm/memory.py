"""The Neural State Machine's memory: read before a chunk, written after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.errors import CompositionError
from altx.layer import FRESH, StepInfo, advanced, scoped
from altx.layout import take
from altx.masking import by_document, real_first
from altx.memory import Memory, Read, Scan
from altx.router import Router
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_nsm.cell import Cell
from altx_nsm.config import NSMConfig, capabilities
from altx_nsm.measures import Measures
from altx_nsm.population import Population
from altx_nsm.routing import Choice, by_content, by_router, unit

SPEC = {
    "slots": Leaf(kind="memory", fp32=True),
    "total": Leaf(kind="memory", fp32=True),
    "mass": Leaf(kind="memory", fp32=True),
    "open": Leaf(kind="counter"),
    "born": Leaf(kind="counter"),
}

ENOUGH = 1e-6
"""Tokens' worth of mass in a chunk from which a state counts as touched."""
SHARPNESS = 8.0
"""Initial factor of the cosines that a token chooses by."""


class Slots(NamedTuple):
    """S states of B rows, and what the open chunk has told them so far.

    Args:
        slots: (B, S, K + W), as they were before the open chunk: a key, and what is read.
        total: (B, S, K + W + 1), sum over the open chunk's tokens of share times query, value and strength.
        mass: (B, S), sum of their shares.
        open: (B,) int64, tokens in the open chunk.
        born: (B, S) int64, how often each state had come to life; see `Population`.
    """

    slots: Tensor
    total: Tensor
    mass: Tensor
    open: Tensor
    born: Tensor

    def rows(self, index: Tensor) -> Slots:
        return Slots(*(leaf[index] for leaf in self))

    def where(self, keep: Tensor, other: Slots) -> Slots:
        """These in the rows where keep (B,), the other elsewhere."""
        pairs = zip(self, other, strict=True)
        return Slots(*(torch.where(keep.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


class NSM(Memory):
    """S states that tokens choose by content, read, and change together, C tokens at a time.

    A state has a key, by which it is chosen and which the queries of those that chose it draw near, and a value. Were
    the key made of the value, then a write would move the state away from the tokens that look for what they wrote.
    How far a write goes is the writers' shares of the state: who chose another holds on to little of this one.

    Rows count their chunks from their first real token, and again from every reset.

    Args:
        config: sizes, and when states die and split.
        dim: model width D.
        router: chooses the states instead of the match of contents: any that decides by the token alone and keeps
            no state, for `config.slots` targets of kind "states". A dead state must get no token. The states then
            have no keys (K is 0, otherwise W), and the router is given their values.

    Shape: x (B, T, D) to a read value (B, T, D). State: see `Slots`, numbers in at least float32.

    Raises:
        CompositionError: if the router looks at other tokens, mixes tokens, or needs more than these.
    """

    def __init__(self, config: NSMConfig, dim: int, router: Router | None = None) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        width = config.width or dim
        self.router = router
        self.parts = (width if router is None else 0, width)
        self.initial = nn.Parameter(torch.empty(config.slots, sum(self.parts)))
        if router is None:
            self.q_proj = nn.Linear(dim, width, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor([math.log(SHARPNESS)]))
        else:
            self.capabilities = replace(self.capabilities, losses=_accepted(router))
        self.v_proj = nn.Linear(dim, width, bias=False)
        self.write_gate = nn.Linear(dim, 1)
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.cell = Cell(width, config.heads)
        self.population = Population(config)
        keys, values = self.initial.split(self.parts, -1)
        # Keys about as long as queries: were they longer, one write would hardly turn them.
        nn.init.normal_(keys, std=width**-0.5)
        nn.init.normal_(values, std=0.1)

    def param_groups(self) -> dict[str, dict[str, float]]:
        """Decay would draw the initial states together."""
        return {"initial": {"weight_decay": 0.0}}

    def on_step(self, info: StepInfo) -> None:
        """Let states live and die by the step's load."""
        super().on_step(info)
        if "load" in info.metrics:
            self.population.update(info.metrics["load"], self.initial, info.step)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        device = torch.device(device or self.initial.device)
        precise = torch.promote_types(dtype or self.initial.dtype, torch.float32)
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return State(self._fresh(batch, device, precise)._asdict(), SPEC, seen=seen)

    def _fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> Slots:
        slots = self.initial.to(device, dtype).repeat(batch, 1, 1)
        total = slots.new_zeros(*slots.shape[:2], slots.shape[2] + 1)
        born = self.population.born.to(device).repeat(batch, 1)
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        return Slots(slots, total, slots.new_zeros(slots.shape[:2]), nothing, born)

    def offset(self, state: State) -> list[int]:
        counts: list[int] = state["open"].tolist()
        return counts

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read the states as they were before the open chunk; nothing changes by it."""
        held = self._held(state)
        x = q if ctx.mask is None else q.masked_fill(~ctx.mask[..., None], 0)
        with _exactly(x):
            value = self._found(x, held.slots, ctx.mask)
            if ctx.reset is not None:
                later = (ctx.reset if ctx.mask is None else ctx.reset & ctx.mask).cumsum(1) > 0
                fresh = self._fresh(len(held.open), held.slots.device, held.slots.dtype)
                value = torch.where(later[..., None], self._found(x, fresh.slots, ctx.mask), value)
        return self._value(value, q), state

    def _found(self, x: Tensor, slots: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = self._choose(self._queries(x, slots.dtype), slots, mask).share @ slots.split(self.parts, -1)[1]
        return found

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        _, held, measures = self._advance(u, self._held(state), ctx)
        return state.replace(seen=advanced(state.seen, u, ctx), **held._asdict()), self._losses(measures)

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """Chunk after chunk, all tokens of a chunk at once; equal to a loop of `read` and `write`.

        The balance loss is that of all the tokens together.
        """
        value, held, measures = self._advance(x, self._held(state), ctx)
        state = state.replace(seen=advanced(state.seen, x, ctx), **held._asdict())
        metrics = measures.metrics(self.population.alive)
        return Scan(self._value(value, x), state, self._losses(measures), metrics)

    def _losses(self, measures: Measures) -> dict[str, Tensor]:
        if self.router is not None:
            return scoped("router", measures.mean_losses(self.router.capabilities.losses))
        return {"balance": measures.balance(self.population.alive)} if self.config.balance_weight else {}

    def _value(self, found: Tensor, x: Tensor) -> Read:
        """What was read (B, T, W) as a value (B, T, D) of x's dtype."""
        return Read(self.out_proj(found.to(self.out_proj.weight.dtype)).to(x.dtype))

    def _held(self, state: State) -> Slots:
        """The state's slots; those of states that have come to life since start afresh."""
        held = Slots(**state.leaves)
        reborn = held.born != self.population.born
        fresh = self._fresh(len(held.open), held.slots.device, held.slots.dtype)
        return held._replace(
            slots=torch.where(reborn[..., None], fresh.slots, held.slots),
            total=held.total.masked_fill(reborn[..., None], 0),
            mass=held.mass.masked_fill(reborn, 0),
            born=fresh.born,
        )

    def _advance(self, x: Tensor, held: Slots, ctx: Context) -> tuple[Tensor, Slots, Measures]:
        """What the tokens of x (B, T, D) find (B, T, W), and the states after them."""
        measures = Measures.none(held.slots)
        if not x.shape[0] or not x.shape[1]:
            return held.slots.new_zeros(*x.shape[:2], self.parts[1]), held, measures
        if ctx.reset is None:
            moved = real_first(x, ctx)
            value, held = self._chunks(moved.x, moved.lengths, held, measures)
            return moved.restore(value), held, measures
        # Each document is a row that starts afresh, but for those that go on with what came before the call.
        starts = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
        goes_on = torch.zeros_like(starts)
        goes_on[:, 0] = ~starts[:, 0]
        first = (starts | goes_on).flatten().nonzero().flatten()
        row = first // x.shape[1]
        fresh = self._fresh(len(row), held.slots.device, held.slots.dtype)
        documents = by_document(x, ctx)
        moved = real_first(documents.x, Context(mask=documents.mask))
        value, after = self._chunks(
            moved.x, moved.lengths, held.rows(row).where(goes_on.flatten()[first], fresh), measures
        )
        last = torch.bincount(row, minlength=len(x)).cumsum(0) - 1
        return documents.restore(moved.restore(value)), after.rows(last), measures

    def _chunks(self, x: Tensor, lengths: Tensor | None, held: Slots, measures: Measures) -> tuple[Tensor, Slots]:
        """As `_advance`, for rows of `lengths` (B,) real tokens, first in their rows, without resets."""
        length, size, dtype = x.shape[1], self.config.chunk, held.slots.dtype
        q, v, strength = self._queries(x, dtype), self.v_proj(x).to(dtype), self.write_gate(x).to(dtype).sigmoid()
        # Every row's tokens on its own grid of chunks, which its open chunk begins.
        count, width, before = (1, 1, torch.zeros_like(held.open)) if length == 1 else (
            (length + size - 2) // size + 1, size, held.open
        )  # fmt: skip
        token = torch.arange(count * width, device=x.device) - before[:, None]
        stop = length if lengths is None else lengths[:, None]
        here = ((token >= 0) & (token < stop)).unflatten(1, (count, width))
        token = token.clamp(0, length - 1)
        q, v, strength = (take(each, token).unflatten(1, (count, width)) for each in (q, v, strength))
        told = torch.cat([q, v], -1) if self.router is None else v
        alive, reads = self.population.alive, []
        with _exactly(x):
            for i in range(count):
                slots, total, mass, filled, born = held
                choice = self._choose(q[:, i], slots, here[:, i])
                reads.append(choice.share @ slots.split(self.parts, -1)[1])
                share = choice.share.transpose(1, 2)
                total = total + torch.cat([share @ told[:, i], share.square() @ strength[:, i]], -1)
                mass = mass + choice.share.sum(1)
                filled = filled + here[:, i].sum(1)
                measures.add(choice, here[:, i])
                held = self._closed(Slots(slots, total, mass, filled, born), alive)
        place = (before[:, None] + torch.arange(length, device=x.device)).clamp(max=count * width - 1)
        return take(torch.cat(reads, 1), place), held

    def _closed(self, held: Slots, alive: Tensor) -> Slots:
        """The states after the chunk in the rows where it is full, and as they were elsewhere."""
        full = held.open == self.config.chunk
        if held.slots.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(full.any()):
            return held
        touched = full[:, None] & alive & (held.mass >= ENOUGH)
        mean = held.total / held.mass.clamp(min=ENOUGH)[..., None]
        query, told, strength = mean.split((*self.parts, 1), -1)
        strength = strength * touched[..., None]
        key, value = held.slots.split(self.parts, -1)
        most = self.config.chunk * self.config.k
        at = held.mass.topk(most).indices if self.router is None and most < self.config.slots else None
        return Slots(
            torch.cat([key.lerp(query, strength), self.cell(told, value, strength, alive, at)], -1),
            held.total.masked_fill(full[:, None, None], 0),
            held.mass.masked_fill(full[:, None], 0),
            held.open.masked_fill(full, 0),
            held.born,
        )

    def _queries(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, W) of length 1, to be matched with keys. For another router: x."""
        return unit(self.q_proj(x).to(dtype)) if self.router is None else x

    def _choose(self, q: Tensor, slots: Tensor, mask: Tensor | None) -> Choice:
        alive = self.population.alive
        if self.router is not None:
            return by_router(self.router, q, slots, alive, mask)
        keys, _ = slots.split(self.parts, -1)
        return by_content(q * self.logit_scale.to(q.dtype).exp(), unit(keys), alive, self.config.k, mask)


def _exactly(x: Tensor) -> torch.autocast:
    """The states are kept in float32, autocast or not."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def _accepted(router: Router) -> dict[str, float]:
    """Weights of the losses of a router that a chunk of tokens may be given to.

    Raises:
        CompositionError: if it is none.
    """
    able = router.capabilities
    if able.lookahead != "token" or able.mixes or able.growth != "none" or able.requires or not able.masked:
        raise CompositionError(
            f"nsm gives a router one chunk at a time, and {type(router).__name__} looks at other tokens, mixes them, "
            "keeps a state, takes no mask or asks for more than tokens",
            hint="use a router with lookahead 'token', such as topk",
        )
    return {f"router.{name}": weight for name, weight in able.losses.items()}


def build(config: NSMConfig, ctx: BuildContext) -> Memory:
    return NSM(config, ctx.dim)
