"""Softmax attention between slots that are near each other, for all rounds of hashing together.

P pairs of row and head, T tokens, R rounds, S slots, D head width, b block, w = reach + b window.

The rounds' results, each weighted by its share of the normaliser, are one softmax over all that a token sees in any
round. So one normaliser per token is all that the backward pass needs: scores are computed again, piece by piece, and
memory is linear in T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from altx_reformer.order import Order

SELF = -5e4
"""Score of a token with itself: it counts only where there is nothing else to see. That of reformer-pytorch."""
HIDDEN = -1e30
"""Score of what is not seen; finite, so that a row that sees nothing is not NaN."""
LEAST = -80.0
"""What exp is taken of at the least, below the largest score: e^-80 = 2e-35 is a normal number, and nothing."""

PIECE = {"cpu": 1 << 20}
"""Scores held at a time, so that they fit into the cache; elsewhere as many as ELSEWHERE."""
ELSEWHERE = 1 << 25


def attend(q_PTD: Tensor, k_PTD: Tensor, v_PTD: Tensor, order: Order) -> Tensor:
    """Attention of q to k and v in the given order: (P, T, D). Scores are q . k as they are.

    A token that is in no slot that asks gets some finite numbers.
    """
    y: Tensor = _Attend.apply(q_PTD, k_PTD, v_PTD, order)  # type: ignore[no-untyped-call]
    return y


class _Sorted:
    """Some pairs' order as indices into flat tables of their tokens and slots."""

    def __init__(self, order: Order, pairs: slice, like: Tensor) -> None:
        tokens = order.tokens[pairs]
        self.count, self.length = tokens.shape[0], like.shape[1]
        base = torch.arange(self.count, device=tokens.device)[:, None]
        # An empty slot shows some token; nobody looks.
        self.rows = (tokens.clamp(min=0) + base * self.length).flatten()
        self.lead = order.reach
        self.answering = self.front(self.rows)
        self.slots = (order.slots[pairs].flatten(1) + base * tokens.shape[1]).reshape(-1, order.slots.shape[2])
        self.asks = order.asks[pairs].flatten()
        low = None if order.low is None else order.low[pairs] + base * tokens.shape[1]
        self.block, self.window = order.block, order.reach + order.block
        self.order = order
        self.tokens = tokens.flatten().int()  # half as much to compare
        self.seen = None if order.band else self.windows(self.front(self.tokens))
        self.kind = None if order.kind is None else order.kind[pairs].flatten()
        self.kinds = None if self.kind is None else self.windows(self.front(self.kind))
        self.blocks = self.rows.shape[0] // self.block
        self.low: Tensor | None = None
        if low is not None:
            # As a column of the query's window, which begins `reach` slots before its block.
            begin = torch.arange(self.blocks, device=low.device)[:, None] * self.block - order.reach
            self.low = (low.reshape(-1, self.block) - begin).clamp(min=0)[..., None].to(like.dtype)
        self.columns = torch.arange(self.window, device=tokens.device)

    def front(self, x: Tensor) -> Tensor:
        """x (S, ...) with `reach` more slots in front, for the first window; what is there does not count."""
        need = self.lead
        copies = -(-need // max(x.shape[0], 1))
        return torch.cat([x.repeat(copies, *[1] * (x.dim() - 1))[-need:], x])

    def windows(self, x: Tensor) -> Tensor:
        """The windows (blocks, w, ...) of x (reach + S, ...), which overlap in memory."""
        step = x.stride(0)
        count = (x.shape[0] - self.lead) // self.block
        return x.as_strided((count, self.window, *x.shape[1:]), (self.block * step, step, *x.stride()[1:]))

    def pieces(self) -> Iterator[slice]:
        """The blocks, as many at a time as there should be scores in memory."""
        budget = PIECE.get(self.rows.device.type, ELSEWHERE)
        step = max(budget // (self.block * self.window), 1)
        for start in range(0, self.blocks, step):
            yield slice(start, min(start + step, self.blocks))

    def hide(self, scores: Tensor, piece: slice, space: _Space) -> Tensor | None:
        """Give scores (n, b, w) of a piece, in place, their final values: what is not seen, and oneself.

        In sums and products of numbers: on CPUs, masks of bool take ten times as long.

        Returns:
            1 where a query does not see and 0 where it does, broadcastable to (n, b, w); None if it sees everything.
        """
        scores.diagonal(self.lead, 1, 2).fill_(SELF)
        if self.order.band:
            assert self.low is not None
            columns, own = self.columns.to(scores.dtype), torch.arange(self.block, device=scores.device)[:, None]
            outside = (self.columns < own) | (self.columns > own + self.lead)
            hidden = torch.sub(self.low[piece], columns, out=space.empty("hidden", *scores.shape))
            hidden.clamp_(0, 1).add_(outside.to(scores.dtype)).clamp_(max=1)
            scores.add_(hidden, alpha=HIDDEN)
            return hidden
        assert self.seen is not None
        seen, mine = self.seen[piece, None], self.tokens.reshape(-1, self.block, 1)[piece]
        # Where chunks close their circle, a token can meet itself in another round.
        first = slice((1 - piece.start) % self.order.turn, None, self.order.turn)
        scores[first, :, : self.lead].masked_fill_(seen[first, :, : self.lead] == mine[first], SELF)
        if self.order.full:
            return None
        unseen = seen < 0
        if self.order.causal:
            unseen = unseen | (seen > mine)
        if self.kind is not None and self.kinds is not None:
            unseen = unseen | (self.kinds[piece, None] != self.kind.reshape(-1, self.block, 1)[piece])
        hidden = unseen.to(scores.dtype)
        scores.add_(hidden, alpha=HIDDEN)
        return hidden

    def asked(self, x_PTD: Tensor, piece: slice, space: _Space, name: str) -> Tensor:
        """These pairs' x at the slots of a piece: (n, b, D)."""
        rows = self.rows[piece.start * self.block : piece.stop * self.block]
        return space.gather(name, x_PTD, rows).reshape(-1, self.block, x_PTD.shape[-1])

    def answers(self, x_PTD: Tensor, piece: slice, space: _Space, name: str) -> Tensor:
        """These pairs' x in the windows of a piece: (n, w, D)."""
        return self.windows(space.gather(name, x_PTD, self.answering[self.reached(piece)]))

    def reached(self, piece: slice) -> slice:
        """The slots in a piece's windows, counted from the ones in front of the first."""
        return slice(piece.start * self.block, piece.stop * self.block + self.lead)

    def sum_rounds(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum of each token's slots of x (S, D), weighted by (tokens, R): (pairs, T, D)."""
        y = F.embedding_bag(self.slots, x, mode="sum", per_sample_weights=weights)
        return y.reshape(self.count, self.length, -1)


class _Space:
    """Memory that is used again and again: on a CPU, fresh memory costs more to touch than to compute with."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.held: dict[str, Tensor] = {}

    def empty(self, name: str, *shape: int) -> Tensor:
        """A tensor of that shape with anything in it, valid until that name is asked for again."""
        if torch.compiler.is_compiling():
            return self.like.new_empty(shape)
        need = math.prod(shape)
        if name not in self.held or self.held[name].numel() < need:
            self.held[name] = self.like.new_empty(need)
        return self.held[name][:need].view(shape)

    def gather(self, name: str, x_PTD: Tensor, index: Tensor) -> Tensor:
        """Rows (len(index), D) of x at flat indices."""
        flat = x_PTD.reshape(-1, x_PTD.shape[-1])
        return torch.index_select(flat, 0, index, out=self.empty(name, len(index), flat.shape[1]))

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b."""
        return torch.bmm(a, b, out=self.empty(name, a.shape[0], a.shape[1], b.shape[2]))


def _groups(order: Order) -> Iterator[slice]:
    """Pairs that are worked on together."""
    pairs, slots = order.tokens.shape
    budget = PIECE.get(order.tokens.device.type, ELSEWHERE)
    step = min(max(budget // max(slots * (order.reach + order.block), 1), 1), max(pairs, 1))
    for start in range(0, pairs, step):
        yield slice(start, min(start + step, pairs))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, order: Order) -> Tensor:
        y, top, total = torch.empty_like(q), *q.new_empty(2, *q.shape[:2])
        both, space = torch.cat([k, v], -1), _Space(q)
        for pairs in _groups(order):
            place = _Sorted(order, pairs, q)
            y[pairs], top[pairs], total[pairs] = _forward(q[pairs], both[pairs], place, space)
        ctx.save_for_backward(q, both, y, top, total)
        ctx.order = order
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, both, y, top, total = ctx.saved_tensors
        dq, d_both, space = torch.empty_like(q), torch.empty_like(both), _Space(q)
        share = (dy * y).sum(-1)
        for pairs in _groups(ctx.order):
            place = _Sorted(ctx.order, pairs, q)
            told = dy[pairs], top[pairs], total[pairs], share[pairs]
            dq[pairs], d_both[pairs] = _backward(q[pairs], both[pairs], *told, place, space)
        dk, dv = d_both.chunk(2, -1)
        return dq, dk, dv, None


def _exp(scores: Tensor, top: Tensor, hidden: Tensor | None) -> None:
    """exp(scores - top) in place, and 0 where hidden is 1."""
    # Where the result is no normal number, exp is eight times slower on CPUs.
    scores.sub_(top).clamp_(min=LEAST).exp_()
    if hidden is not None:
        scores.addcmul_(scores, hidden, value=-1)


def _forward(q: Tensor, both: Tensor, place: _Sorted, space: _Space) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (P, T, D), each token's largest score, and the sum of exp(score - largest), both (P, T).

    They stay apart: next to a largest score of SELF, float32 would lose the logarithm of the sum.
    """
    width = q.shape[-1]
    y = space.empty("y", place.blocks, place.block, width)
    top, total = q.new_empty(2, place.blocks, place.block, 1)
    for piece in place.pieces():
        asked = place.asked(q, piece, space, "asked")
        k, v = place.answers(both, piece, space, "both").chunk(2, -1)
        scores = space.bmm("scores", asked, k.transpose(1, 2))
        hidden = place.hide(scores, piece, space)
        top[piece] = scores.amax(-1, keepdim=True)
        _exp(scores, top[piece], hidden)
        total[piece] = scores.sum(-1, keepdim=True)
        torch.bmm(scores, v, out=y[piece])
    top, total = (t.flatten()[place.slots] for t in (top, total))
    most = top.amax(-1, keepdim=True)
    weights = (top - most).exp()
    # The largest counts 1, where anything is seen at all.
    total = (weights * total).sum(-1, keepdim=True).clamp(min=1)
    mixed = place.sum_rounds(y.reshape(-1, width), weights / total)
    return mixed, most.reshape(place.count, -1), total.reshape(place.count, -1)


def _backward(
    q: Tensor, both: Tensor, dy: Tensor, top: Tensor, total: Tensor, share: Tensor, place: _Sorted, space: _Space
) -> tuple[Tensor, Tensor]:
    """Gradients of q (P, T, D) and of k and v side by side (P, T, 2 D)."""
    width = q.shape[-1]
    top, part, share = (t.flatten()[place.rows] for t in (top, total.reciprocal(), share))
    # The softmax of a slot that does not ask is 0. Its token's largest score is not its own, hence the other number.
    top, part = top.masked_fill(~place.asks, -HIDDEN), part.masked_fill(~place.asks, 0)
    top, part, share = (t.reshape(-1, place.block, 1) for t in (top, part, share))
    dq = space.empty("dq", place.blocks, place.block, width)
    d_both = space.empty("d_both", len(place.answering), 2 * width).zero_()
    for piece in place.pieces():
        asked, given = place.asked(q, piece, space, "asked"), place.asked(dy, piece, space, "given")
        k, v = place.answers(both, piece, space, "both").chunk(2, -1)
        scores = space.bmm("scores", asked, k.transpose(1, 2))
        _exp(scores, top[piece], place.hide(scores, piece, space))
        scores *= part[piece]
        slope = space.bmm("slope", given, v.transpose(1, 2)).sub_(share[piece]).mul_(scores)
        torch.bmm(slope, k, out=dq[piece])
        dk = space.bmm("dk", slope.transpose(1, 2), asked)
        dv = space.bmm("dv", scores.transpose(1, 2), given)
        blocks = d_both[place.reached(piece)].unflatten(0, (-1, place.block))
        for step in range(place.window // place.block):
            columns = slice(step * place.block, (step + 1) * place.block)
            near = blocks[step : step + len(dk)]
            near[..., :width] += dk[:, columns]
            near[..., width:] += dv[:, columns]
    told = d_both[place.lead :]
    d_tokens = place.sum_rounds(told)
    if place.order.echo:
        # Copies of chunks, which only answer.
        def copies(x: Tensor) -> Tensor:
            return x.reshape(place.count * place.slots.shape[1], -1, *x.shape[1:])[:, : place.order.echo].flatten(0, 1)

        d_tokens.flatten(0, 1).index_add_(0, copies(place.rows), copies(told))
    return place.sum_rounds(dq.reshape(-1, width)), d_tokens
