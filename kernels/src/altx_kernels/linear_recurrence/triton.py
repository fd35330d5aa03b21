"""Linear recurrences on a GPU, in chunks of tokens that meet in matrix products.

Within a chunk, G_t is the sum of the g so far. Three things make up the output, and the next state:

    o_t = exp(G_t) q_t S  +  sum over s <= t of exp(G_t - G_s) (q_t k_s) v_s
    S'  = exp(G_end) S  +  sum over s of exp(G_end - G_s) k_s v_s

A program keeps S (or a block of its columns) in registers and walks from chunk to chunk. Where sequences times heads
are too few for the GPU, the sequences are cut into segments: what each adds to the state, a scan over that, the
outputs. No exponent is ever positive, so that any decay is safe.

The gradients are linear recurrences too, some backwards in time and some with the decay on the columns of S:

    dq_t = sum over s <= t of exp(G_t - G_s) (do_t v_s) k_s         q, k, v <- do, v, k
    dk_s = sum over t >= s of exp(G_t - G_s) (v_s do_t) q_t         q, k, v <- v, do, q, backwards
    dv_s = sum over t >= s of exp(G_t - G_s) (k_s q_t) do_t         q, k, v <- k, q, do, backwards
    dg_t = sum over i >= t of q_i dq_i - k_i dk_i, and S dS after the last
"""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu import INTERPRETED
from altx_kernels.gpu.common import carry, exp, piece, suffix_sums
from altx_kernels.gpu.launching import (
    DEVICE,
    capability,
    cut,
    dot_types,
    launch,
    power_of_2,
    rows,
    segment,
)  # fmt: skip
from altx_kernels.primitive import Primitive

# Where the decay acts: not at all, on all of S, on its rows (key channels), on its columns.
NONE, HEAD, ROW, COLUMN = 0, 1, 2, 3
# The side of a chunk where decays differ by channel, for which pairs of tokens are weighed one lag at a time.
SMALL = 16
# Key channels that a program's registers hold.
WIDEST = 256
# Below this log decay the past is gone: exp(-100) is no float32 but a denormal one.
GONE = tl.constexpr(-100.0)


@triton.jit
def load_g(g, t, mask, reset, RESET: tl.constexpr):
    """g of tokens t, shaped as `mask`; a reset is a decay to nothing."""
    x = tl.load(g, mask, 0.0).to(tl.float32)
    if RESET:
        x = tl.where(tl.load(reset + t, mask, 0) != 0, float("-inf"), x)
    return x


@triton.jit
def load_head(g, at, t, mask, sg, reset, GATE: tl.constexpr, RESET: tl.constexpr):
    """One head's g at tokens t, and where it wipes out the past; g is 0 there."""
    x = t.to(tl.float32) * 0
    if GATE != 0:
        x = tl.load(g + at + t * sg, mask, 0.0).to(tl.float32)
    gone = x < GONE
    if RESET:
        gone = gone | (tl.load(reset + t, mask, 0) != 0)
    return tl.where(gone, 0.0, x), gone


@triton.jit(do_not_specialize=["T", "L"])
def pairs_kernel(
    q, k, g, reset, A, table, T, L, sq, hq, sk, hk, sg, hg, H, RQ, RK, K,
    RESET: tl.constexpr, PACKED: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A[t, s] = sum over channels of q_t k_s exp(G_t - G_s) in a small chunk, by lag t - s."""
    i = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    _n, start, stop = piece(i, table, T, L, PACKED)
    r = tl.arange(0, C)
    c = tl.arange(0, BK)
    t = start + r
    inside = (t < stop)[:, None] & (c < K)[None, :]
    qq = tl.load(q + t[:, None] * sq + (h // RQ) * hq + c[None, :], inside, 0.0).to(tl.float32)
    D = tl.zeros([C, BK], tl.float32)
    out = tl.zeros([C, C], tl.float32)
    for lag in range(C):
        s = (t - lag)[:, None]
        there = inside & (s >= start)
        kk = tl.load(k + s * sk + (h // RK) * hk + c[None, :], there, 0.0).to(tl.float32)
        a = tl.sum(qq * kk * exp(D), 1)
        out += tl.where(r[:, None] - r[None, :] == lag, a[:, None], 0.0)
        D += load_g(g + s * sg + h * hg + c[None, :], s, there, reset, RESET)
    tl.store(A + (t[:, None] * H + h) * C + r[None, :], out, (t < stop)[:, None])


@triton.jit(do_not_specialize=["T", "L"])
def chunks_kernel(
    q, k, v, g, reset, A, o, begin, end, decays, table, T, L,
    sq, hq, sk, hk, sv, hv, sg, hg, H, RQ, RK, RV, K, V,
    GATE: tl.constexpr, RESET: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, BEGIN: tl.constexpr,
    OUT: tl.constexpr, END: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Walk through a piece: write o if OUT, the state after it if END, and where not OUT the piece's own decay."""
    i = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    _n, start, stop = piece(i, table, T, L, PACKED)
    r = tl.arange(0, C)
    ck = tl.arange(0, BK)
    cv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_state = (ck < K)[:, None] & (cv < V)[None, :]
    at_state = (i * H + h) * K * V + ck[:, None] * V + cv[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if BEGIN:
        S = tl.load(begin + at_state, in_state, 0.0).to(tl.float32)
    # The logarithm of what the piece multiplies the state with.
    if GATE == 2:
        log_decay = tl.zeros([BK], tl.float32)
    elif GATE == 3:
        log_decay = tl.zeros([BV], tl.float32)
    else:
        log_decay = 0.0
    number = tl.cdiv(stop - start, C)
    for step in range(number):
        first = start + step * C
        if REVERSE:
            first = start + (number - 1 - step) * C
        last = tl.minimum(first + C, stop)
        t = first + r
        there = t < last
        in_k = there[:, None] & (ck < K)[None, :]
        in_v = there[:, None] & (cv < V)[None, :]
        kk = tl.load(k + t[:, None] * sk + (h // RK) * hk + ck[None, :], in_k, 0.0)
        vv = tl.load(v + t[:, None] * sv + (h // RV) * hv + cv[None, :], in_v, 0.0)
        pairs = r[:, None] >= r[None, :]
        if REVERSE:
            pairs = r[:, None] <= r[None, :]

        # w_first: decay from before the chunk up to a token; w_last: from a token to the chunk's end; whole: of all.
        if GATE == 2:
            at_g = h * hg + ck[None, :]
            own = load_g(g + t[:, None] * sg + at_g, t[:, None], in_k, reset, RESET)
            in_next = (t + 1 < last)[:, None] & (ck < K)[None, :]
            following = load_g(g + (t + 1)[:, None] * sg + at_g, (t + 1)[:, None], in_next, reset, RESET)
            total = tl.sum(own, 0)
            w_first = exp(tl.cumsum(own, 0))
            w_last = exp(tl.cumsum(following, 0, reverse=True))
            whole = exp(total)[:, None]
        elif GATE == 3:
            at_g = h * hg + cv[None, :]
            own = load_g(g + t[:, None] * sg + at_g, t[:, None], in_v, reset, RESET)
            in_next = (t + 1 < last)[:, None] & (cv < V)[None, :]
            following = load_g(g + (t + 1)[:, None] * sg + at_g, (t + 1)[:, None], in_next, reset, RESET)
            total = tl.sum(own, 0)
            w_first = exp(tl.cumsum(own, 0))
            w_last = exp(tl.cumsum(following, 0, reverse=True))
            whole = exp(total)[None, :]
        elif GATE == 1 or RESET:
            own, gone = load_head(g, h * hg, t, there, sg, reset, GATE, RESET)
            following, _gone_next = load_head(g, h * hg, t + 1, t + 1 < last, sg, reset, GATE, RESET)
            # Tokens between which the past was wiped out do not meet: they have different numbers.
            number_of = tl.cumsum(gone.to(tl.int32), 0)
            wiped = tl.sum(gone.to(tl.int32), 0)
            G = tl.cumsum(own, 0)
            w_first = tl.where(number_of == 0, exp(G), 0.0)[:, None]
            w_last = tl.where(number_of == wiped, exp(tl.cumsum(following, 0, reverse=True)), 0.0)[:, None]
            total = tl.where(wiped == 0, tl.sum(own, 0), float("-inf"))
            whole = exp(total)
            if OUT:
                pairs = pairs & (number_of[:, None] == number_of[None, :])
                if tl.bfloat16 == DT:
                    lags = G[:, None] - G[None, :]
                    if REVERSE:
                        lags = -lags
                elif REVERSE:
                    # A difference of sums loses digits that float32 has.
                    lags = tl.cumsum(tl.where(r[None, :] > r[:, None], own[None, :], 0.0), 1)
                else:
                    lags = tl.cumsum(tl.where(r[:, None] > r[None, :], own[:, None], 0.0), 0)
                weights = exp(tl.where(pairs, lags, float("-inf")))
        if REVERSE and (GATE != 0 or RESET):
            w_first, w_last = w_last, w_first

        if OUT:
            qq = tl.load(q + t[:, None] * sq + (h // RQ) * hq + ck[None, :], in_k, 0.0)
            if GATE == 2:
                rows_of, columns_of = t[:, None], r[None, :]
                if REVERSE:
                    rows_of, columns_of = t[None, :], r[:, None]
                in_a = pairs & there[:, None] & there[None, :]
                P = tl.load(A + (rows_of * H + h) * C + columns_of, in_a, 0.0)
                y = tl.dot((qq * w_first).to(DT), S.to(DT), input_precision=PREC)
                y = tl.dot(P.to(DT), vv.to(DT), y, input_precision=PREC)
            else:
                P = tl.dot(qq.to(DT), tl.trans(kk).to(DT), input_precision=PREC)
                y = tl.dot(qq.to(DT), S.to(DT), input_precision=PREC)
                if GATE == 3:
                    y *= w_first
                    D = tl.zeros([C, BV], tl.float32)
                    for lag in range(C):
                        if REVERSE:
                            s = (t + lag)[:, None]
                            near = in_v & (s < last)
                            # The decay up to s is that of s itself and those between.
                            D += load_g(g + s * sg + h * hg + cv[None, :], s, near & (lag > 0), reset, RESET)
                            a = tl.sum(tl.where(r[None, :] - r[:, None] == lag, P, 0.0), 1)
                        else:
                            s = (t - lag)[:, None]
                            near = in_v & (s >= first)
                            a = tl.sum(tl.where(r[:, None] - r[None, :] == lag, P, 0.0), 1)
                        vs = tl.load(v + s * sv + (h // RV) * hv + cv[None, :], near, 0.0).to(tl.float32)
                        y += a[:, None] * exp(D) * vs
                        if not REVERSE:
                            D += load_g(g + s * sg + h * hg + cv[None, :], s, near, reset, RESET)
                else:
                    if GATE == 1 or RESET:
                        y *= w_first
                        P *= weights
                    else:
                        P = tl.where(pairs, P, 0.0)
                    y = tl.dot(P.to(DT), vv.to(DT), y, input_precision=PREC)
            tl.store(o + (t[:, None] * H + h) * V + cv[None, :], y.to(o.dtype.element_ty), in_v)

        if GATE == 0 and not RESET:
            S = tl.dot(tl.trans(kk).to(DT), vv.to(DT), S, input_precision=PREC)
        else:
            # What has decayed to nothing is nothing, were it infinite.
            S = tl.where(whole == 0, 0.0, S * whole)
            if GATE == 2:
                S = tl.dot(tl.trans(kk * w_last).to(DT), vv.to(DT), S, input_precision=PREC)
            else:
                S = tl.dot(tl.trans(kk).to(DT), (vv * w_last).to(DT), S, input_precision=PREC)
            log_decay += total
    if END:
        tl.store(end + at_state, S, in_state)
    if not OUT:
        if GATE == 2:
            tl.store(decays + (i * H + h) * K + ck, log_decay, ck < K)
        elif GATE == 3:
            tl.store(decays + (i * H + h) * V + cv, log_decay, cv < V)
        else:
            tl.store(decays + i * H + h, log_decay)


@triton.jit
def step_kernel(
    q, k, v, g, reset, begin, o, end, sq, hq, sk, hk, sv, hv, sg, hg, H, RK, K, V,
    GATE: tl.constexpr, RESET: tl.constexpr, BEGIN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of each row: the state is read once and written once."""
    n = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    ck = tl.arange(0, BK)
    cv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_state = (ck < K)[:, None] & (cv < V)[None, :]
    at_state = (n * H + h) * K * V + ck[:, None] * V + cv[None, :]
    kk = tl.load(k + n * sk + (h // RK) * hk + ck, ck < K, 0.0).to(tl.float32)
    vv = tl.load(v + n * sv + h * hv + cv, cv < V, 0.0).to(tl.float32)
    qq = tl.load(q + n * sq + (h // RK) * hq + ck, ck < K, 0.0).to(tl.float32)
    S = kk[:, None] * vv[None, :]
    if BEGIN:
        past = tl.load(begin + at_state, in_state, 0.0).to(tl.float32)
        if GATE == 1:
            past *= exp(tl.load(g + n * sg + h * hg).to(tl.float32))
        if GATE == 2:
            past *= exp(tl.load(g + n * sg + h * hg + ck, ck < K, 0.0).to(tl.float32))[:, None]
        if RESET:
            past = tl.where(tl.load(reset + n) != 0, 0.0, past)
        S += past
    tl.store(end + at_state, S, in_state)
    y = tl.sum(qq[:, None] * S, 0)
    tl.store(o + (n * H + h) * V + cv, y.to(o.dtype.element_ty), cv < V)


def config(K: int, V: int, gate: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Tokens in a chunk, blocks and warps for a state of K rows and V columns.

    q and k are whole in registers, and three parts of float32 beside each other (see dot_types), so that its chunks
    are small. The interpreter gets small chunks, so that small examples have several.
    """
    BK, BV, C, warps = power_of_2(K), 32, SMALL, 8
    if dtype == torch.bfloat16:
        if gate in (ROW, COLUMN):
            BV = 64 if capability >= 90 else 32
        elif BK <= 128:
            C, warps = (64, 8) if capability >= 90 else (32, 4)
    if BK > 128:
        BV //= 2
    return {"C": SMALL if INTERPRETED else C, "BK": BK, "BV": max(16, min(power_of_2(V), BV)), "num_warps": warps}


def _gate(g: Tensor | None, columns: bool) -> int:
    return NONE if g is None else HEAD if g.dim() == 3 else COLUMN if columns else ROW


def _layout(*tensors: Tensor | None) -> list[int]:
    """The strides of a token and a head, of each."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[1:3])]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, heads: int, *, columns: bool = False, reverse: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op for any number of heads in each of q, k and v, backwards too, and with the decay on the columns of S.

    Args:
        heads: of the result; a multiple of those of q, k and v.
        columns: whether g (B, T, H, V) decays the columns.
        reverse: whether time runs from the last token to the first; then g at t decays from t to t - 1.
        dtype: of o; default: that of v.

    Returns:
        o (B, T, H, V) and the state (N, H, K, V) in float32.
    """
    B, T, K, V = *q.shape[:2], q.shape[3], v.shape[3]
    gate = _gate(g, columns)
    blocks = config(K, V, gate, v.dtype, capability(v.device))
    C = blocks["C"]
    grid_v = triton.cdiv(V, blocks["BV"])
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    q, k, v, g = rows(q), rows(k), rows(v), None if g is None else rows(g)
    state = None if state is None else state.contiguous()
    reset = None if reset is None else reset.contiguous()
    o = v.new_empty(B, T, heads, V, dtype=dtype or v.dtype)
    final = v.new_empty(N, heads, K, V, dtype=torch.float32)
    ratios = [heads // x.shape[2] for x in (q, k, v)]
    sizes = (*_layout(q, k, v, g), heads, *ratios, K, V)
    flags: dict[str, Any] = {"GATE": gate, "RESET": reset is not None, "PACKED": cu_seqlens is not None}
    A = None
    if gate == ROW:
        A = v.new_empty(B, T, heads, C, dtype=torch.float32)
        small = cut(v, cu_seqlens, C)
        # Backwards the pairs are those of the other time direction, transposed: q is what k was.
        first, second, ratio = (k, q, (ratios[1], ratios[0])) if reverse else (q, k, (ratios[0], ratios[1]))
        launch(
            pairs_kernel, (small.count * heads,), first, second, g, reset, A, small.table, T, C,
            *_layout(first, second, g), heads, *ratio, K,
            RESET=flags["RESET"], PACKED=flags["PACKED"], C=C, BK=blocks["BK"], num_warps=4,
        )  # fmt: skip
    common = {**flags, "REVERSE": reverse, **blocks, **dot_types(v.dtype)}
    length = segment(v, T, N * heads * grid_v, C)
    pieces = cut(v, cu_seqlens, length)
    grid = (pieces.count * heads, grid_v)
    states = state
    if length is not None:
        states = v.new_empty(pieces.count, heads, K, V, dtype=torch.float32)
        decays = v.new_empty(
            pieces.count, heads, *((V,) if gate == COLUMN else (K,) * (gate == ROW)), dtype=states.dtype
        )
        launch(
            chunks_kernel, grid, q, k, v, g, reset, A, o, state, states, decays, pieces.table, T, pieces.length, *sizes,
            **common, BEGIN=False, OUT=False, END=True,
        )  # fmt: skip
        inner = {NONE: K * V, HEAD: K * V, ROW: V, COLUMN: 1}[gate]
        mod = V if gate == COLUMN else K * V
        carry(pieces, states, decays, state, final, inner=inner, mod=mod, outer=K * V, reverse=reverse)
    launch(
        chunks_kernel, grid, q, k, v, g, reset, A, o, states, final, None, pieces.table, T, pieces.length, *sizes,
        **common, BEGIN=states is not None, OUT=True, END=length is None,
    )  # fmt: skip
    return o, final


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op for one token a row."""
    B, H, K, V = v.shape[0], v.shape[2], q.shape[3], v.shape[3]
    o, final = v.new_empty(v.shape), v.new_empty(B, H, K, V, dtype=torch.float32)
    BK = power_of_2(K)
    BV = min(power_of_2(V), max(16, 4096 // BK))
    q, k, v, g = rows(q), rows(k), rows(v), None if g is None else rows(g)
    launch(
        step_kernel, (B * H, triton.cdiv(V, BV)), q, k, v, g, None if reset is None else reset.contiguous(),
        None if state is None else state.contiguous(), o, final, *_layout(q, k, v, g), H, H // q.shape[2], K, V,
        GATE=_gate(g, False), RESET=reset is not None, BEGIN=state is not None, BK=BK, BV=BV, num_warps=4,
    )  # fmt: skip
    return o, final


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not v.numel():
        return _nothing(q, v, initial_state, cu_seqlens)
    if v.shape[1] == 1 and cu_seqlens is None:
        return step(q, k, v, g, reset, initial_state)
    return recurrence(q, k, v, g, reset, initial_state, cu_seqlens, v.shape[2])


def _nothing(q: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without tokens, the state stays."""
    final = _forward_fake(q, q, v, None, state, None, cu_seqlens)[1].zero_()
    return torch.empty_like(v, memory_format=torch.contiguous_format), final if state is None else final.copy_(state)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape), state


def _backward(
    do: Tensor, dS: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None, final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    H, G = v.shape[2], q.shape[2]
    dq, dk, dv, dg, d_initial = _backward_fake(do, dS, q, k, v, g, initial_state, reset, cu_seqlens, final)
    if not v.numel():
        return dq.zero_(), dk.zero_(), dv.zero_(), dg.zero_(), d_initial.copy_(dS) if d_initial.numel() else d_initial
    past = None if initial_state is None else initial_state.transpose(-1, -2)
    each: dict[str, Any] = {"columns": True, "dtype": torch.float32}
    dq_heads, _ = recurrence(do, v, k, g, reset, past, cu_seqlens, H, **each)
    dk_heads, _ = recurrence(v, do, q, g, reset, dS.transpose(-1, -2), cu_seqlens, H, reverse=True, **each)
    dv, dS0 = recurrence(k, q, do, g, reset, dS, cu_seqlens, H, reverse=True, dtype=v.dtype)
    if initial_state is not None:
        d_initial = dS0.to(initial_state.dtype)
    shape = (*v.shape[:2], G, H // G, q.shape[3])
    of_groups_q, of_groups_k = dq_heads.view(shape), dk_heads.view(shape)
    if g is not None:
        change = (of_groups_q * q.unsqueeze(3) - of_groups_k * k.unsqueeze(3)).view(*v.shape[:2], H, -1)
        after = (final * dS).sum(-1)
        if g.dim() == 3:
            change, after = change.sum(-1), after.sum(-1)
        dg = suffix_sums(change, after, cu_seqlens)
        lost = g < GONE.value
        if reset is not None:
            lost = lost | reset.view(*reset.shape, *(1,) * (g.dim() - 2))
        dg = dg.masked_fill(lost, 0).to(g.dtype)
    return of_groups_q.sum(3).to(q.dtype), of_groups_k.sum(3).to(k.dtype), dv, dg, d_initial


def _backward_fake(
    do: Tensor, dS: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None, final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg, d_initial = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (g, initial_state))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, d_initial


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial_state, reset, cu_seqlens, final = ctx.saved_tensors
    dq, dk, dv, dg, d_initial = BACKWARD(do, dS, q, k, v, g, initial_state, reset, cu_seqlens, final)
    return dq, dk, dv, None if g is None else dg, None if initial_state is None else d_initial, None, None


BACKWARD = Primitive("altx::linear_recurrence_triton_backward", _backward, _backward_fake, device=DEVICE)
FORWARD = Primitive(
    "altx::linear_recurrence_triton", _forward, _forward_fake, save=_save, backward=_differentiate, device=DEVICE
)


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, initial_state: Tensor | None = None,
    reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `altx_kernels.linear_recurrence.linear_recurrence`; V up to 256, no float64."""
    parts = triton.cdiv(q.shape[3], WIDEST)
    if parts <= 1:
        o, final = FORWARD(q, k, v, g, initial_state, reset, cu_seqlens)
        return o, final
    # Rows of a state do not meet, and what is read from them adds up.
    gs = g.tensor_split(parts, 3) if g is not None and g.dim() == 4 else [g] * parts
    states = [None] * parts if initial_state is None else initial_state.tensor_split(parts, 2)
    found = [
        FORWARD(q_, k_, v, g_, state, reset, cu_seqlens)
        for q_, k_, g_, state in zip(q.tensor_split(parts, 3), k.tensor_split(parts, 3), gs, states, strict=True)
    ]
    total = torch.stack([o for o, _ in found]).sum(0, dtype=torch.float32).to(v.dtype)
    return total, torch.cat([final for _, final in found], 2)
