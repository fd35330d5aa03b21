"""Backend "torch": the recurrence chunk by chunk, as matrix products, on any device.

Within a chunk that begins with the state S, and with L[t, s] = exp(g_{s+1} + ... + g_t),

    A_xy[t, s] = sum_k x_t[k] y_s[k] L[.., s][k],     s <= t and L[t, s] for q, s < t and L[t-1, s] for b
    (1 - A_ba) U = (b L[t-1, start]) S + A_bk V       what b reads: a triangular system
    O = (q L[t, start]) S + A_qk V + A_qa U
    S' = L[end, start] S + (k L[end, s])^T V + (a L[end, s])^T U

(the WY form of Yang et al. 2024, arXiv:2406.06484, with a decay). Every L is a product of factors that are at most 1
and is summed up from its own g alone. No quotient of two decays is formed, so that any g is right, -inf and a reset
among them; the price is a tensor (chunk, chunk, K) where each key channel has a decay of its own.

The adjoint is written out: it keeps the state before each chunk and computes the rest again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import solve_triangular

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast
from altx_kernels.delta_rule import reference
from altx_kernels.packing import one_by_one

CHUNK = {"head": 64, "key": 8}  # tokens, for a decay per head and per key channel


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None = None,
    *, initial_state: Tensor | None = None, reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference."""
    if cu_seqlens is not None:
        per_token = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g, "reset": reset}
        return one_by_one(delta_rule, cu_seqlens, per_token, initial_state)
    with no_autocast(q.device):
        if q.shape[1] == 1:
            return reference.delta_rule(q, k, v, a, b, g, initial_state=initial_state, reset=reset)
        dtype = precise(q, k, v, a, b, g, initial_state)
        batch, _, heads, width = q.shape
        if g is None:
            g = q.new_zeros(q.shape[:3], dtype=dtype)
        if reset is not None:
            b = b.masked_fill(reset[:, :, None, None], 0)
            g = g.masked_fill(reset[(..., *[None] * (g.dim() - 2))], -torch.inf)
        if g.dim() == 3:
            g = g[..., None]
        if initial_state is None:
            initial_state = q.new_zeros(batch, heads, width, v.shape[3], dtype=dtype)
        inputs = (x.to(dtype) for x in (q, k, v, a, b, g, initial_state))
        o, state = _Chunks.apply(*inputs)  # type: ignore[no-untyped-call]
        return o.to(v.dtype), state


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *per_token, S = inputs
        outputs, states = [], []
        for start, stop in _cuts(per_token[-1]):
            states.append(S)
            o, S = _chunk(per_token, start, stop, S).forward()
            outputs.append(o.transpose(1, 2))
        ctx.save_for_backward(*per_token, torch.stack(states) if states else S.new_empty(0, *S.shape))
        o = torch.cat(outputs, 1) if outputs else torch.zeros_like(per_token[2])
        return o, S.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        *per_token, states = ctx.saved_tensors
        do, dS = gradients
        pieces: list[list[Tensor]] = [[] for _ in per_token]
        with no_autocast(do.device):
            for i, (start, stop) in reversed(list(enumerate(_cuts(per_token[-1])))):
                chunk = _chunk(per_token, start, stop, states[i])
                *found, dS = chunk.backward(do[:, start:stop].transpose(1, 2), dS)
                for piece, x in zip(pieces, found, strict=True):
                    piece.append(x.transpose(1, 2))
        joined = [
            torch.cat(piece[::-1], 1) if piece else torch.zeros_like(x)
            for piece, x in zip(pieces, per_token, strict=True)
        ]
        return *joined, dS


def _cuts(g: Tensor) -> list[tuple[int, int]]:
    length = g.shape[1]
    size = CHUNK["head" if g.shape[3] == 1 else "key"]
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _chunk(per_token: list[Tensor], start: int, stop: int, S: Tensor) -> _Chunk:
    q, k, v, a, b, g = (x[:, start:stop].transpose(1, 2) for x in per_token)
    return _Chunk(q, k, v, a, b, g, S)


class _Chunk:
    """C tokens of every head: q, k, a, b (B, H, C, K), v (B, H, C, V), g (B, H, C, K or 1), S (B, H, K, V)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, S: Tensor) -> None:
        self.q, self.k, self.v, self.a, self.b, self.S = q, k, v, a, b, S
        self.L = L = _products(g)
        # L has a row and a column more than there are tokens, for the chunk's start.
        self.upto, self.before = L[:, :, 1:, 1:], L[:, :, :-1, 1:]
        self.from_start, self.before_from_start = L[:, :, 1:, 0], L[:, :, :-1, 0]
        self.to_end, self.whole = L[:, :, -1, 1:], L[:, :, -1, 0, :, None]
        self.A_qk, self.A_qa = _pair(q, self.upto, k), _pair(q, self.upto, a)
        self.A_bk, self.A_ba = _pair(b, self.before, k), _pair(b, self.before, a)
        read = (b * self.before_from_start) @ S + self.A_bk @ v
        self.U = solve_triangular(-self.A_ba, read, upper=False, unitriangular=True)

    def forward(self) -> tuple[Tensor, Tensor]:
        o = (self.q * self.from_start) @ self.S + self.A_qk @ self.v + self.A_qa @ self.U
        return o, self.whole * self.S + (self.k * self.to_end).mT @ self.v + (self.a * self.to_end).mT @ self.U

    def backward(self, do: Tensor, dS: Tensor) -> tuple[Tensor, ...]:
        q, k, v, a, b, S, U = self.q, self.k, self.v, self.a, self.b, self.S, self.U
        a_end, k_end = a * self.to_end, k * self.to_end
        dU = self.A_qa.mT @ do + a_end @ dS
        dread = solve_triangular(-self.A_ba.mT, dU, upper=True, unitriangular=True)
        dv = self.A_qk.mT @ do + k_end @ dS + self.A_bk.mT @ dread
        # By way of the states at either end,
        dq, db, dk, da = do @ S.mT, dread @ S.mT, v @ dS.mT, U @ dS.mT
        dL = torch.zeros_like(self.L)  # times L: the gradient of L's logarithm
        _add(dL[:, :, 1:, 0], dq * q * self.from_start)
        _add(dL[:, :, :-1, 0], db * b * self.before_from_start)
        _add(dL[:, :, -1, 1:], dk * k_end + da * a_end)
        _add(dL[:, :, -1, 0], (dS * S).sum(-1) * self.whole[..., 0])
        dq, db = dq * self.from_start, db * self.before_from_start
        dk, da = dk * self.to_end, da * self.to_end
        # and from token to token.
        for x, dx, L, dlog, (dA_k, A_k), (dA_a, A_a) in (
            (q, dq, self.upto, dL[:, :, 1:, 1:], (do @ v.mT, self.A_qk), (do @ U.mT, self.A_qa)),
            (b, db, self.before, dL[:, :, :-1, 1:], (dread @ v.mT, self.A_bk), (dread @ U.mT, self.A_ba)),
        ):
            if L.shape[-1] == 1:
                dlog += (dA_k * A_k + dA_a * A_a)[..., None]
                dA_k, dA_a = dA_k * L[..., 0], dA_a * L[..., 0]
                dx += dA_k @ k + dA_a @ a
                dk += dA_k.mT @ x
                da += dA_a.mT @ x
            else:
                both = dA_k[..., None] * k[:, :, None] + dA_a[..., None] * a[:, :, None]
                both *= L
                dx += both.sum(-2)
                dlog += both * x[..., None, :]
                xL = x[..., None, :] * L
                dk += (dA_k[..., None] * xL).sum(-3)
                da += (dA_a[..., None] * xL).sum(-3)
        decayed = self.whole * dS
        dS = decayed + (q * self.from_start).mT @ do + (b * self.before_from_start).mT @ dread
        # g_r is in L[t, s] for s < r <= t.
        dg = dL.flip(2).cumsum(2).flip(2).cumsum(3).diagonal(-1, 2, 3).mT
        return dq, dk, dv, da, db, dg, dS


def _products(g: Tensor) -> Tensor:
    """L[t, s] from g (.., C, J): (.., C+1, C+1, J), 0 for t < s. Its first row and column stand for the start."""
    length = g.shape[-2]
    later = torch.ones(length + 1, length + 1, dtype=torch.bool, device=g.device).tril(-1)[..., None]
    steps = torch.nn.functional.pad(g, (0, 0, 1, 0))[..., None, :].where(later, 0)
    same = torch.ones(length + 1, length + 1, dtype=torch.bool, device=g.device).tril()[..., None]
    return steps.cumsum(-3).exp().where(same, 0)


def _pair(x: Tensor, L: Tensor, y: Tensor) -> Tensor:
    """sum_k x_t y_s L[t, s]: (.., C, C)."""
    if L.shape[-1] == 1:
        return x @ y.mT * L[..., 0]
    return (x[..., None, :] * L * y[..., None, :, :]).sum(-1)


def _add(to: Tensor, x: Tensor) -> None:
    """Add x (.., K) to a tensor (.., K or 1)."""
    to += x if to.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)
