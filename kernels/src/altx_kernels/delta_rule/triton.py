"""The delta rule on a GPU, token by token: a program keeps a block of the state's columns in registers.

The columns of S do not meet: only its rows are mixed. So that a program does, for each token,

    u = b^T S,    S <- exp(g) S + a u^T + k v^T,    o = q^T S

and its gradient, with E that of S, walks through the sequence once forwards, writing S down every few tokens, and
once backwards: a few tokens forwards from there, each S into memory that stays in cache, and back.

    E += q do^T,    w = E^T a,    db = S_before w,    da = E u,    dk = E v,    dv = E^T k,    dq = S do
    dg = exp(g) (E * S_before) 1,    E <- exp(g) E + b w^T

Gradients of keys are sums over the blocks of columns, in a fixed order.
"""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.common import exp, piece
from altx_kernels.gpu.launching import DEVICE, cut, launch, power_of_2, rows
from altx_kernels.primitive import Primitive

# What g decays: nothing, the head's state, or single rows of it.
NONE, HEAD, ROW = 0, 1, 2


@triton.jit
def row_of(x, t, stride, h, head, c, size):
    """A token's vector of one head."""
    return tl.load(x + t * stride + h * head + c, c < size, 0.0).to(tl.float32)


@triton.jit
def decay_of(g, t, sg, h, hg, c, K, GATE: tl.constexpr, BK: tl.constexpr):
    """exp(g) of a token for each row of the state."""
    x = tl.zeros([BK], tl.float32)
    if GATE == 1:
        x += tl.load(g + t * sg + h * hg).to(tl.float32)
    if GATE == 2:
        x += row_of(g, t, sg, h, hg, c, K)
    return exp(x)


@triton.jit
def advance(S, k, v, a, b, g, reset, t, sk, hk, sv, hv, sa, ha, sb, hb, sg, hg, h, ck, cv, K, V,
            GATE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """The state after a token, and what counts as the state before it."""
    if reset is not None:
        S = tl.where(tl.load(reset + t) != 0, 0.0, S)
    kk = row_of(k, t, sk, h, hk, ck, K)
    aa = row_of(a, t, sa, h, ha, ck, K)
    bb = row_of(b, t, sb, h, hb, ck, K)
    vv = row_of(v, t, sv, h, hv, cv, V)
    u = tl.sum(bb[:, None] * S, 0)
    after = aa[:, None] * u[None, :] + kk[:, None] * vv[None, :]
    if GATE == 0:
        after += S
    else:
        after += decay_of(g, t, sg, h, hg, ck, K, GATE, BK)[:, None] * S
    return after, S


@triton.jit(do_not_specialize=["T", "L"])
def forward_kernel(
    q, k, v, a, b, g, reset, begin, o, end, table, T, L,
    sq, hq, sk, hk, sv, hv, sa, ha, sb, hb, sg, hg, H, K, V,
    GATE: tl.constexpr, PACKED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    n, start, stop = piece(i, table, T, L, PACKED)
    ck = tl.arange(0, BK)
    cv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_state = (ck < K)[:, None] & (cv < V)[None, :]
    at_state = (n * H + h) * K * V + ck[:, None] * V + cv[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if begin is not None:
        S = tl.load(begin + at_state, in_state, 0.0).to(tl.float32)
    for step in tl.range(0, (stop - start).to(tl.int32), num_stages=3):
        t = start + step
        S, _before = advance(
            S, k, v, a, b, g, reset, t, sk, hk, sv, hv, sa, ha, sb, hb, sg, hg, h, ck, cv, K, V, GATE, BK
        )
        y = tl.sum(row_of(q, t, sq, h, hq, ck, K)[:, None] * S, 0)
        tl.store(o + (t * H + h) * V + cv, y.to(o.dtype.element_ty), cv < V)
    tl.store(end + at_state, S, in_state)


@triton.jit(do_not_specialize=["T", "L", "tokens", "KEPT"])
def backward_kernel(
    do, d_end, q, k, v, a, b, g, reset, begin, checks, room, dq, dk, dv, da, db, dg, d_begin, table, T, L, tokens, KEPT,
    sq, hq, sk, hk, sv, hv, sa, ha, sb, hb, sg, hg, H, K, V,
    GATE: tl.constexpr, PACKED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    n, start, stop = piece(i, table, T, L, PACKED)
    block = tl.program_id(1)
    ck = tl.arange(0, BK)
    cv = block * BV + tl.arange(0, BV)
    in_state = (ck < K)[:, None] & (cv < V)[None, :]
    at_block = ck[:, None] * V + cv[None, :]
    at_state = (n * H + h) * K * V + at_block
    # A sequence's states lie behind those that all before it may need.
    check = checks + (start // KEPT + i) * H * K * V + h * K * V + at_block
    room += (i * H + h) * KEPT * K * V + at_block
    S = tl.zeros([BK, BV], tl.float32)
    if begin is not None:
        S = tl.load(begin + at_state, in_state, 0.0).to(tl.float32)
    for t in range(start, stop):
        if (t - start) % KEPT == 0:
            tl.store(check + (t - start) // KEPT * H * K * V, S, in_state)
        S, _before = advance(
            S, k, v, a, b, g, reset, t, sk, hk, sv, hv, sa, ha, sb, hb, sg, hg, h, ck, cv, K, V, GATE, BK
        )
    tl.debug_barrier()

    E = tl.load(d_end + at_state, in_state, 0.0).to(tl.float32)
    number = tl.cdiv(stop - start, KEPT)
    for back in range(number):
        c = number - 1 - back
        first = start + c * KEPT
        last = tl.minimum(first + KEPT, stop)
        S = tl.load(check + c * H * K * V, in_state, 0.0)
        for t in range(first, last):
            S, before = advance(
                S, k, v, a, b, g, reset, t, sk, hk, sv, hv, sa, ha, sb, hb, sg, hg, h, ck, cv, K, V, GATE, BK
            )
            tl.store(room + (t - first) * K * V, before, in_state)
        tl.debug_barrier()
        for step in range(last - first):
            t = last - 1 - step
            before = tl.load(room + (t - first) * K * V, in_state, 0.0)
            qq = row_of(q, t, sq, h, hq, ck, K)
            kk = row_of(k, t, sk, h, hk, ck, K)
            aa = row_of(a, t, sa, h, ha, ck, K)
            bb = row_of(b, t, sb, h, hb, ck, K)
            vv = row_of(v, t, sv, h, hv, cv, V)
            given = tl.load(do + (t * H + h) * V + cv, cv < V, 0.0).to(tl.float32)
            u = tl.sum(bb[:, None] * before, 0)
            decay = decay_of(g, t, sg, h, hg, ck, K, GATE, BK)
            S = decay[:, None] * before + aa[:, None] * u[None, :] + kk[:, None] * vv[None, :]
            at_key = ((block * tokens + t) * H + h) * K + ck
            tl.store(dq + at_key, tl.sum(S * given[None, :], 1), ck < K)
            E += qq[:, None] * given[None, :]
            w = tl.sum(E * aa[:, None], 0)
            d_v = tl.sum(E * kk[:, None], 0)
            tl.store(dv + (t * H + h) * V + cv, d_v.to(dv.dtype.element_ty), cv < V)
            tl.store(dk + at_key, tl.sum(E * vv[None, :], 1), ck < K)
            tl.store(da + at_key, tl.sum(E * u[None, :], 1), ck < K)
            tl.store(db + at_key, tl.sum(before * w[None, :], 1), ck < K)
            if GATE != 0:
                d_g = decay * tl.sum(E * before, 1)
                if GATE == 1:
                    tl.store(dg + (block * tokens + t) * H + h, tl.sum(d_g, 0))
                else:
                    tl.store(dg + at_key, d_g, ck < K)
            E = decay[:, None] * E + bb[:, None] * w[None, :]
            if reset is not None:
                E = tl.where(tl.load(reset + t) != 0, 0.0, E)
        # What was read must not be written over before all have read it.
        tl.debug_barrier()
    if d_begin is not None:
        tl.store(d_begin + at_state, E, in_state)


def config(K: int, V: int) -> dict[str, int]:
    """The block of columns that a program keeps, 2048 numbers, and its warps."""
    BK = power_of_2(K)
    return {"BK": BK, "BV": min(power_of_2(V, 1), max(8, 2048 // BK)), "num_warps": 4 if BK > 64 else 2}


def _layout(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[1:3])]


def _gate(g: Tensor | None) -> int:
    return NONE if g is None else HEAD if g.dim() == 3 else ROW


def _forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, final = _forward_fake(q, k, v, a, b, g, initial_state, reset, cu_seqlens)
    if not v.numel():
        return o, final.zero_() if initial_state is None else final.copy_(initial_state)
    (H, V), K = v.shape[2:], q.shape[3]
    q, k, v, a, b = (rows(x) for x in (q, k, v, a, b))
    g = None if g is None else rows(g)
    initial_state, reset = (None if x is None else x.contiguous() for x in (initial_state, reset))
    pieces, blocks = cut(v, cu_seqlens, None), config(K, V)
    launch(
        forward_kernel, (pieces.count * H, triton.cdiv(V, blocks["BV"])), q, k, v, a, b, g, reset, initial_state, o,
        final, pieces.table, pieces.tokens, pieces.length, *_layout(q, k, v, a, b, g), H, K, V,
        GATE=_gate(g), PACKED=cu_seqlens is not None, **blocks,
    )  # fmt: skip
    return o, final


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape), state


def _backward(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None,
    initial_state: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    results = _backward_fake(do, d_final, q, k, v, a, b, g, initial_state, reset, cu_seqlens)
    if not v.numel():
        for x in results:
            x.zero_()
        results[-1].copy_(d_final)
        return results
    (B, T, H, V), K = v.shape, q.shape[3]
    q, k, v, a, b = (rows(x) for x in (q, k, v, a, b))
    g = None if g is None else rows(g)
    initial_state, reset = (None if x is None else x.contiguous() for x in (initial_state, reset))
    pieces, blocks = cut(v, cu_seqlens, None), config(K, V)
    number = triton.cdiv(V, blocks["BV"])
    # The states written down and those recomputed between two of them take the same room at the square root of T.
    kept = min(power_of_2(int(T**0.5)), 64)

    def room(*shape: int) -> Tensor:
        return do.new_empty(*shape, dtype=torch.float32)

    dq, dk, da, db = (room(number, B, T, H, K) for _ in range(4))
    dg = room(number, B, T, H, *((K,) if _gate(g) == ROW else ()))
    launch(
        backward_kernel, (pieces.count * H, number), do.contiguous(), d_final.contiguous(), q, k, v, a, b, g, reset,
        initial_state, room(B * T // kept + pieces.count + 1, H, K, V), room(pieces.count, H, kept, K, V), dq, dk,
        results[2], da, db, dg, results[-1], pieces.table, pieces.tokens, pieces.length, B * T, kept,
        *_layout(q, k, v, a, b, g), H, K, V, GATE=_gate(g), PACKED=cu_seqlens is not None, **blocks,
    )  # fmt: skip
    of_q, of_k, of_a, of_b = (d.sum(0).to(x.dtype) for d, x in ((dq, q), (dk, k), (da, a), (db, b)))
    of_g = results[5] if g is None else dg.sum(0).to(g.dtype)
    return of_q, of_k, results[2], of_a, of_b, of_g, results[6]


def _backward_fake(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None,
    initial_state: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, da, db = (x.new_empty(x.shape) for x in (q, k, v, a, b))
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    return dq, dk, dv, da, db, dg, d_final.new_empty(d_final.shape)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, do: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = BACKWARD(do, d_final, *saved)
    return *(None if x is None else d.to(x.dtype) for x, d in zip(saved[:7], found, strict=True)), None, None


BACKWARD = Primitive("altx::delta_rule_triton_backward", _backward, _backward_fake, device=DEVICE)
FORWARD = Primitive(
    "altx::delta_rule_triton", _forward, _forward_fake, save=_save, backward=_differentiate, device=DEVICE
)


def run(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None = None, *,
    initial_state: Tensor | None = None, reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `altx_kernels.delta_rule.delta_rule`; K up to 256, no float64."""
    o, final = FORWARD(q, k, v, a, b, g, initial_state, reset, cu_seqlens)
    return o, final
