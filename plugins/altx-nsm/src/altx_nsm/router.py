"""The Neural State Machine's token-to-state routing as a router: each target is known by a state, and states change."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH, advanced
from altx.layout import take
from altx.masking import by_document, real_first
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_nsm.config import TokenToStateConfig, token_to_state_capabilities
from altx_nsm.routing import ENOUGH, SHARPNESS, best, unit

SPEC = {
    "slots": Leaf(kind="memory", fp32=True),
    "total": Leaf(kind="memory", fp32=True),
    "square": Leaf(kind="memory", fp32=True),
    "open": Leaf(kind="counter"),
}


class Slots(NamedTuple):
    """States of n targets in B rows, and what the open chunk has told them so far.

    Args:
        slots: (B, n, W), as they were before the open chunk.
        total: (B, n, W + 1), sum over the open chunk's writes of query and 1. What a token writes to a state is its
            weight for the state times its strength.
        square: (B, n, 1), sum of the squares of these writes.
        open: (B,) int64, tokens in the open chunk.
    """

    slots: Tensor
    total: Tensor
    square: Tensor
    open: Tensor


class TokenToState(Router):
    """Token choice of the k targets whose states a token matches best; a state follows the tokens that choose it.

        q_t = W_q x_t / |W_q x_t|,  a_t = softmax of the k highest of c cos(q_t, s_i)
        a token writes                w_ti = a_ti sigmoid(w x_t + b)
        after each chunk of C tokens  s_i <- s_i + (sum_t w_ti^2 / sum_t w_ti) (sum_t w_ti q_t / sum_t w_ti - s_i)

    A state of the Neural State Machine has a key like s_i, by which it is chosen, and holds what is read besides; here
    the targets are in the place of that. States that no token chose hold every bit. A token is routed by the states
    from before its chunk. Rows count their chunks from their first real token, and again from every reset. Without a
    chunk the states are learned and never change.

    The states are the router's own: a target's change while it runs, which is after the route of a whole call is
    known, and how a call is cut must not matter. A caller that knows the states before gives them as `targets.keys`
    ((n, W) or (B, n, W), NSM does); they are matched instead, and nothing changes.

    Args:
        config: k, width, chunk.
        dim: model width D.
        n: number of targets.

    State: see `Slots`, numbers in at least float32; none without a chunk.
    """

    def __init__(self, config: TokenToStateConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = token_to_state_capabilities(config)
        width = config.state_width(dim)
        self.initial = nn.Parameter(torch.empty(n, width))
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(SHARPNESS)]))
        self.write_gate = nn.Linear(dim, 1) if config.chunk else None
        nn.init.normal_(self.initial)

    def param_groups(self) -> dict[str, dict[str, float]]:
        """Decay would draw the states together."""
        return {"initial": {"weight_decay": 0.0}}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | None:
        if self.write_gate is None:
            return None
        device = torch.device(device or self.initial.device)
        slots = self._fresh(batch, device, torch.promote_types(dtype or self.initial.dtype, torch.float32))
        return State(slots._asdict(), SPEC, seen=torch.zeros(batch, dtype=torch.int64, device=device))

    def _fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> Slots:
        slots = self.initial.to(device, dtype).repeat(batch, 1, 1)
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        total = slots.new_zeros(*slots.shape[:2], slots.shape[2] + 1)
        return Slots(slots, total, slots.new_zeros(*slots.shape[:2], 1), nothing)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        n, k, precise = targets.n, self.config.k, torch.promote_types(x.dtype, torch.float32)
        alive = torch.ones(n, dtype=torch.bool, device=x.device) if targets.alive is None else targets.alive
        present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if ctx.mask is None else ctx.mask
        valid = present & alive.any()
        width = self.initial.shape[1]
        if targets.keys is not None and targets.keys.shape[-1] != width:
            given = targets.keys.shape[-1]
            raise ValueError(f"states of width {given}, and this router's keys have {width}; set its width to {given}")
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            if self.write_gate is None or targets.keys is not None:
                real = torch.where(present[..., None], x, 0)
                scores = self._scores(
                    self._queries(real, precise), self.initial if targets.keys is None else targets.keys
                )
            else:
                held = self._fresh(len(x), x.device, precise) if state is None else Slots(**state.leaves)
                scores, held = self._advance(x, held, alive, ctx)
                if state is not None:
                    state = state.replace(seen=advanced(state.seen, x, ctx), **held._asdict())
        scores = scores.masked_fill(~alive, torch.finfo(scores.dtype).min)
        index, weight = best(scores, k)
        used = valid[..., None] & alive[index]
        target, weight = torch.where(used, index, -1), torch.where(used, weight, 0)
        load = torch.zeros(n + 1, device=x.device, dtype=torch.float32)
        load = load.index_add(0, torch.where(used, index, n).flatten(), load.new_ones(index.numel()))[:n]
        probs = torch.where(valid[..., None], torch.softmax(scores, -1), 0).sum((0, 1)) / valid.sum().clamp(min=1)
        losses = {}
        if self.config.balance_weight:
            losses["balance"] = alive.sum() * (load / load.sum().clamp(min=1) * probs).sum()
        metrics = {
            "load": load,
            "max_load": load.max() / (load.sum() / alive.sum().clamp(min=1)).clamp(min=1 / n),
            "entropy": -torch.xlogy(probs.detach(), probs.detach()).sum(),
            "drop_rate": torch.zeros_like(load[0]),
            "no_target": (present & ~valid).sum(),
        }
        token = torch.arange(present.numel(), device=x.device).repeat_interleave(k)
        return Route(n, token, target.flatten(), weight.flatten(), losses, metrics, state)

    def _queries(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, W) of length 1."""
        return unit(F.linear(x.to(dtype), self.q_proj.weight.to(dtype)))

    def _scores(self, q: Tensor, states: Tensor) -> Tensor:
        """(B, T, n) of queries (B, T, W) and states (n, W) or (B, n, W)."""
        scores: Tensor = self._sharp(q) @ unit(states.to(q.dtype)).transpose(-1, -2)
        return scores

    def _sharp(self, q: Tensor) -> Tensor:
        """Queries, as far apart as a choice is sharp."""
        return q * self.logit_scale.to(q.dtype).exp()

    def _advance(self, x: Tensor, held: Slots, alive: Tensor, ctx: Context) -> tuple[Tensor, Slots]:
        """Scores (B, T, n) of the tokens, and the states after them."""
        if not x.shape[0] or not x.shape[1]:
            return held.slots.new_zeros(*x.shape[:2], held.slots.shape[1]), held
        if ctx.reset is None:
            moved = real_first(x, ctx)
            scores, held = self._chunks(moved.x, moved.lengths, held, alive)
            return moved.restore(scores), held
        # Each document is a row that starts afresh, but for those that go on with what came before the call.
        starts = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
        goes_on = torch.zeros_like(starts)
        goes_on[:, 0] = ~starts[:, 0]
        first = (starts | goes_on).flatten().nonzero().flatten()
        row = first // x.shape[1]
        on = goes_on.flatten()[first]
        fresh = self._fresh(len(row), x.device, held.slots.dtype)
        before = Slots(
            *(torch.where(on.view(-1, *[1] * (a.dim() - 1)), a[row], b) for a, b in zip(held, fresh, strict=True))
        )
        documents = by_document(x, ctx)
        moved = real_first(documents.x, Context(mask=documents.mask))
        scores, after = self._chunks(moved.x, moved.lengths, before, alive)
        last = torch.bincount(row, minlength=len(x)).cumsum(0) - 1
        return documents.restore(moved.restore(scores)), Slots(*(leaf[last] for leaf in after))

    def _chunks(self, x: Tensor, lengths: Tensor | None, held: Slots, alive: Tensor) -> tuple[Tensor, Slots]:
        """As `_advance`, for rows of `lengths` (B,) real tokens, first in their rows, without resets."""
        gate, size = self.write_gate, self.config.chunk
        assert gate is not None and size is not None
        length, dtype = x.shape[1], held.slots.dtype
        q = self._queries(x, dtype)
        strength = F.linear(x.to(dtype), gate.weight.to(dtype), gate.bias.to(dtype)).sigmoid()
        # Every row's tokens on its own grid of chunks, which its open chunk begins.
        single = length == 1
        count, width = (1, 1) if single else ((length + size - 2) // size + 1, size)
        before = torch.zeros_like(held.open) if single else held.open
        token = torch.arange(count * width, device=x.device) - before[:, None]
        here = (token >= 0) & (token < (length if lengths is None else lengths[:, None]))
        token = token.clamp(0, length - 1)
        told = torch.cat([q, torch.ones_like(strength)], -1)
        q, told, strength = (take(each, token) for each in (self._sharp(q), told, strength * alive.any()))
        cut = [each.unflatten(1, (count, width)) for each in (q, told, strength * here[..., None], here)]
        found = []
        # Unbound at once: a slice's gradient would be written into zeros of the whole for each chunk.
        for q, told, strength, real in zip(*(each.unbind(1) for each in cut), strict=True):
            scores = q @ unit(held.slots).transpose(-1, -2)
            found.append(scores)
            index, weight = best(scores.masked_fill(~alive, torch.finfo(dtype).min), self.config.k)
            writes = (torch.zeros_like(scores).scatter(-1, index, weight) * strength).transpose(1, 2)
            total, square = held.total + writes @ told, held.square + writes.square().sum(-1, keepdim=True)
            held = self._closed(Slots(held.slots, total, square, held.open + real.sum(1)))
        place = (before[:, None] + torch.arange(length, device=x.device)).clamp(max=count * width - 1)
        return take(torch.cat(found, 1), place), held

    def _closed(self, held: Slots) -> Slots:
        """The states after the chunk in the rows where it is full, and as they were elsewhere."""
        size = self.config.chunk
        assert size is not None
        full = held.open.eq(size)
        if full.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(full.any()):
            return held
        query, mass = held.total.split((held.slots.shape[-1], 1), -1)
        touched = full[:, None, None] & (mass >= ENOUGH)
        mass = mass.clamp(min=ENOUGH)
        return Slots(
            held.slots.lerp(query / mass, held.square / mass * touched),
            held.total.masked_fill(full[:, None, None], 0),
            held.square.masked_fill(full[:, None, None], 0),
            held.open.masked_fill(full, 0),
        )


def build(config: TokenToStateConfig, ctx: BuildContext) -> Router:
    return TokenToState(config, ctx.dim, ctx.num_targets)
