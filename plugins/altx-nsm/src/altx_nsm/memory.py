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
from altx_nsm.routing import ENOUGH, SHARPNESS, Choice, by_content, by_router, unit

SPEC = {
    "keys": Leaf(kind="memory", fp32=True),
    "values": Leaf(kind="memory", fp32=True),
    "total": Leaf(kind="memory", fp32=True),
    "square": Leaf(kind="memory", fp32=True),
    "open": Leaf(kind="counter"),
    "born": Leaf(kind="counter"),
}


class Slots(NamedTuple):
    """S states of B rows, and what the open chunk has told them so far.

    Args:
        keys: (B, S, K), by which states were chosen before the open chunk.
        values: (B, S, W), what was read then.
        total: (B, S, K + W + 1), sum over the open chunk's writes of query, value and 1. What a token writes to a
            state is its share of the state times its strength.
        square: (B, S, 1), sum of the squares of these writes.
        open: (B,) int64, tokens in the open chunk.
        born: (B, S) int64, how often each state had come to life; see `Population`.
    """

    keys: Tensor
    values: Tensor
    total: Tensor
    square: Tensor
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
    A state goes to the mean of what is written in a chunk, where a token counts as far as it writes, so that those
    that only ask leave no mark; and as far as the writers' mean write, so that who chose another changes little of
    this one.

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
        width = config.state_width(dim)
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
        keys, values = (part.repeat(batch, 1, 1) for part in self.initial.to(device, dtype).split(self.parts, -1))
        total = values.new_zeros(*values.shape[:2], sum(self.parts) + 1)
        born = self.population.born.to(device).repeat(batch, 1)
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        return Slots(keys, values, total, values.new_zeros(*values.shape[:2], 1), nothing, born)

    def offset(self, state: State) -> list[int]:
        counts: list[int] = state["open"].tolist()
        return counts

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read the states as they were before the open chunk; nothing changes by it."""
        held = self._held(state)
        x = q if ctx.mask is None else q.masked_fill(~ctx.mask[..., None], 0)
        with _exactly(x):
            value = self._found(x, held, ctx.mask)
            if ctx.reset is not None:
                later = (ctx.reset if ctx.mask is None else ctx.reset & ctx.mask).cumsum(1) > 0
                fresh = self._fresh(len(held.open), held.values.device, held.values.dtype)
                value = torch.where(later[..., None], self._found(x, fresh, ctx.mask), value)
        return self._value(value, q), state

    def _found(self, x: Tensor, held: Slots, mask: Tensor | None) -> Tensor:
        here = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        here = here & self.population.alive.any()
        q = self._sharp(self._queries(x, held.values.dtype))
        found: Tensor = self._choose(q, held, here).share @ held.values
        return found * here[..., None]

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
        fresh = self._fresh(len(held.open), held.values.device, held.values.dtype)
        keys, values, total, square = (
            torch.where(reborn[..., None], new, old) for new, old in zip(fresh[:4], held[:4], strict=True)
        )
        return Slots(keys, values, total, square, held.open, fresh.born)

    def _advance(self, x: Tensor, held: Slots, ctx: Context) -> tuple[Tensor, Slots, Measures]:
        """What the tokens of x (B, T, D) find (B, T, W), and the states after them."""
        if not x.shape[0] or not x.shape[1]:
            found, here = (
                held.values.new_zeros(*x.shape[:2], self.parts[1]),
                x.new_zeros(len(x), 0, 1, dtype=torch.bool),
            )
            return found, held, Measures((), here, held.values.new_zeros(self.config.slots))
        if ctx.reset is None:
            moved = real_first(x, ctx)
            value, held, measures = self._chunks(moved.x, moved.lengths, held)
            return moved.restore(value), held, measures
        # Each document is a row that starts afresh, but for those that go on with what came before the call.
        starts = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
        goes_on = torch.zeros_like(starts)
        goes_on[:, 0] = ~starts[:, 0]
        first = (starts | goes_on).flatten().nonzero().flatten()
        row = first // x.shape[1]
        fresh = self._fresh(len(row), held.values.device, held.values.dtype)
        documents = by_document(x, ctx)
        moved = real_first(documents.x, Context(mask=documents.mask))
        value, after, measures = self._chunks(
            moved.x, moved.lengths, held.rows(row).where(goes_on.flatten()[first], fresh)
        )
        last = torch.bincount(row, minlength=len(x)).cumsum(0) - 1
        return documents.restore(moved.restore(value)), after.rows(last), measures

    def _chunks(self, x: Tensor, lengths: Tensor | None, held: Slots) -> tuple[Tensor, Slots, Measures]:
        """As `_advance`, for rows of `lengths` (B,) real tokens, first in their rows, without resets."""
        length, size, dtype, alive = x.shape[1], self.config.chunk, held.values.dtype, self.population.alive
        q, v, strength = self._queries(x, dtype), self.v_proj(x).to(dtype), self.write_gate(x).to(dtype).sigmoid()
        # Every row's tokens on its own grid of chunks, which its open chunk begins.
        count, width, before = (1, 1, torch.zeros_like(held.open)) if length == 1 else (
            (length + size - 2) // size + 1, size, held.open
        )  # fmt: skip
        token = torch.arange(count * width, device=x.device) - before[:, None]
        stop = length if lengths is None else lengths[:, None]
        here = (token >= 0) & (token < stop)
        token, used = token.clamp(0, length - 1), (here & alive.any())[..., None]
        told = torch.cat([*([q] if self.router is None else []), v, torch.ones_like(strength)], -1)
        q, told, strength = (take(each, token) for each in (self._sharp(q), told, strength))
        cut = [each.unflatten(1, (count, width)) for each in (q, told, strength * used, here)]
        choices, reads = [], []
        with _exactly(x):
            # Unbound at once: a slice's gradient would be written into zeros of the whole for each chunk.
            for q, told, strength, real in zip(*(each.unbind(1) for each in cut), strict=True):
                choice = self._choose(q, held, real)
                choices.append(choice)
                reads.append(choice.share @ held.values)
                writes = (choice.share * strength).transpose(1, 2)
                total, square = held.total + writes @ told, held.square + writes.square().sum(-1, keepdim=True)
                held = self._closed(held._replace(total=total, square=square, open=held.open + real.sum(1)), alive)
        place = (before[:, None] + torch.arange(length, device=x.device)).clamp(max=count * width - 1)
        value = take(torch.cat(reads, 1) * used, place)
        return value, held, Measures(choices, used.view(-1, count, width), held.values.new_zeros(len(alive)))

    def _closed(self, held: Slots, alive: Tensor) -> Slots:
        """The states after the chunk in the rows where it is full, and as they were elsewhere."""
        full = held.open.eq(self.config.chunk)
        if full.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(full.any()):
            return held
        most = self.config.chunk * self.config.k
        at = held.total[..., -1].topk(most).indices if self.router is None and most < self.config.slots else None

        def some(x: Tensor) -> Tensor:
            return x if at is None else x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))

        query, told, mass = some(held.total).split((*self.parts, 1), -1)
        touched = full[:, None, None] & (mass >= ENOUGH)
        mass = mass.clamp(min=ENOUGH)
        strength = some(held.square) / mass * touched
        keys = some(held.keys).lerp(query / mass, strength)
        return Slots(
            keys if at is None else held.keys.scatter(1, at[..., None].expand_as(keys), keys),
            self.cell(told / mass, held.values, strength, alive, at),
            held.total.masked_fill(full[:, None, None], 0),
            held.square.masked_fill(full[:, None, None], 0),
            held.open.masked_fill(full, 0),
            held.born,
        )

    def _queries(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, W) of length 1, to be matched with keys. For another router: x."""
        return unit(self.q_proj(x).to(dtype)) if self.router is None else x

    def _sharp(self, q: Tensor) -> Tensor:
        """Queries, as far apart as a choice is sharp."""
        return q * self.logit_scale.to(q.dtype).exp() if self.router is None else q

    def _choose(self, q: Tensor, held: Slots, mask: Tensor) -> Choice:
        alive = self.population.alive
        if self.router is not None:
            return by_router(self.router, q, held.values, alive, mask)
        return by_content(q, unit(held.keys), alive, self.config.k)


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
