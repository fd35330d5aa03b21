"""The loop over chunks on a GPU, as native.c does it: a program walks through a head's chunks, its states in memory.

A chunk's tokens lie in registers, C x d numbers a matrix. What couples a state's columns is the norm, over a token's
outputs; nothing couples its rows. So products with states are summed over blocks of rows, before the norm, and blocks
are moved on one by one, after it; the states of a head, 12 d^2 bytes, stay in the cache between these two passes. What
the adjoint can say of a chunk by itself, from the states kept before it, a program for each chunk does beforehand.

Memory moves at least, a chunk and head: 16 C d bytes of k, v, q and what is read, 4 C^2 of shares. With gradients:
28 C d and 8 C^2 more, 24 d^2 of states kept and read again (16 without momentum); beyond that floor, 72 C d of what
the adjoint's first kernel hands to its second.

A layer's bias is kept apart from its matrix, which so divides into blocks. Names are those of native.c. Threads meet
(debug_barrier) between loads and stores of the same numbers, which need not be by the same thread.

How warps share products decides how many registers they take. Triton goes by the first of those that are connected: by
its columns if they are more than its rows, else by its rows, of which there are too few. Hence BD > BC, and what comes
first in a loop.
"""

# Where a constant decides, Triton compiles one branch, which takes an `if` of its own.
# ruff: noqa: SIM102
# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.launching import DEVICE, launch, power_of_2
from altx_kernels.primitive import Primitive
from altx_titans.kernels.learn import flat
from altx_titans.kernels.learn.flat import dense
from altx_titans.kernels.learn.tiles import (
    block,
    dot,
    errors,
    missed,
    normal,
    projected,
    row,
    rows,
    store_block,
    store_rows,
    store_vectors,
    unbound,
    vector,
)

ROWS = 16
"""Rows of a state in a block."""

COLUMNS = 32
"""And columns, where products are summed over these."""

WIDE = 64
"""Rows in a block of what is summed over columns alone."""


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    key, value, query, keep, drift, share, last_keep, last_drift, last_share, moving_keep, moving_share, full, anew,
    gain, bias, fresh, weights, start, moving, out, kept, H, N, C, d, I, R, P, Q,
    FACTOR: tl.constexpr, EPS: tl.constexpr, BOUND: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr,
    SCALED: tl.constexpr, MOVES: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0).to(tl.int64)
    c, t, j = tl.arange(0, BD), tl.arange(0, BC), tl.arange(0, BR)
    weights += h * R * P
    start += h * R * P
    if MOVES:
        moving += h * R * P
    g0, beta = vector(gain, h % H, c, P, NORM, BD), vector(bias, h % H, c, P, NORM, BD)
    for n in range(N):
        m = h * N + n
        if anew is not None:
            if tl.load(anew + h // H * N + n) != 0:
                for first in range(0, R * P, BR * BD):
                    e = first + tl.arange(0, BR * BD)
                    F = tl.load(fresh + h * R * P + e, e < R * P, 0.0)
                    tl.store(weights + e, F, e < R * P)
                    tl.store(start + e, F, e < R * P)
                    if MOVES:
                        tl.store(moving + e, tl.zeros_like(F), e < R * P)
                tl.debug_barrier()
        bW, sW = vector(weights, I - 1, c, P, BIASED, BD), vector(weights, I, c, P, SCALED, BD)
        bA, sA = vector(start, I - 1, c, P, BIASED, BD), vector(start, I, c, P, SCALED, BD)
        bS, sS = bW, sW
        if MOVES:
            bS, sS = vector(moving, I - 1, c, P, BIASED, BD), vector(moving, I, c, P, SCALED, BD)
        z, O, QK = tl.zeros([BC, BD], tl.float32), tl.zeros([BC, BD], tl.float32), tl.zeros([BC, BC], tl.float32)
        if query is not None:
            kp = row(keep, m, t, C)
            O += kp[:, None] * bW[None, :]
            QK += BIASED
            if drift is not None:
                dr = row(drift, m, t, C)
                O += dr[:, None] * bS[None, :]
        for first in range(0, d, BR):
            i = first + j
            k, A = rows(key, m, t, i, C, d, Q), block(start, i, c, d, P)
            z += dot(k, A)
            if kept is not None or query is not None:
                W = block(weights, i, c, d, P)
            if query is not None:
                q = rows(query, m, t, i, C, d, Q)
                QK += dot(q, tl.trans(k))
                O += dot(kp[:, None] * q, W)
                if drift is not None:
                    O += dot(dr[:, None] * q, block(moving, i, c, d, P))
            if kept is not None:
                to = kept + m * (2 + MOVES) * R * P
                store_block(to, W, i, c, d, P)
                store_block(to + R * P, A, i, c, d, P)
                if MOVES:
                    store_block(to + 2 * R * P, block(moving, i, c, d, P), i, c, d, P)
        if kept is not None:
            to = kept + m * (2 + MOVES) * R * P
            store_vectors(to, bW, sW, c, P, I, BIASED, SCALED)
            store_vectors(to + R * P, bA, sA, c, P, I, BIASED, SCALED)
            if MOVES:
                store_vectors(to + 2 * R * P, bS, sS, c, P, I, BIASED, SCALED)
        K, v = rows(key, m, t, c, C, d, Q), rows(value, m, t, c, C, d, P)
        hat, rstd, E0 = missed(z + bA[None, :], K, v, g0 + sA, beta, c, d, FACTOR, EPS, NORM)
        E, _mgh, r, Es, rs = errors(hat, rstd, E0, K, g0 + sA, c, d, BOUND, NORM)
        Ew, Eb = E * r[:, None], Es * rs[:, None]
        if query is not None:
            sh = rows(share, m, t, t, C, C, C)
            O -= dot(sh * QK, Ew)
            if NORM:
                gt = kp[:, None] * sW[None, :] + g0[None, :]
                if drift is not None:
                    gt += dr[:, None] * sS[None, :]
                if SCALED:
                    gt -= dot(sh, Eb)
                hat, _rstd = normal(O, c, d, EPS)
                O = hat * gt + beta[None, :] + rows(query, m, t, c, C, d, Q)
            store_rows(out, O, m, t, c, C, P, P)
        # The states after the chunk.
        tl.debug_barrier()
        ends = tl.load(full + h // H * N + n) != 0
        ls, lk = row(last_share, m, t, C), tl.load(last_keep + m)
        bW, sW = lk * bW - BIASED * tl.sum(ls[:, None] * Ew, 0), lk * sW - SCALED * tl.sum(ls[:, None] * Eb, 0)
        if MOVES:
            ld, mk, ms = tl.load(last_drift + m), tl.load(moving_keep + m), row(moving_share, m, t, C)
            bW, sW = bW + ld * bS, sW + ld * sS
            bS = mk * bS - BIASED * tl.sum(ms[:, None] * Ew, 0)
            sS = mk * sS - SCALED * tl.sum(ms[:, None] * Eb, 0)
            store_vectors(moving, bS, sS, c, P, I, BIASED, SCALED)
        store_vectors(weights, bW, sW, c, P, I, BIASED, SCALED)
        if ends:
            store_vectors(start, bW, sW, c, P, I, BIASED, SCALED)
        for first in range(0, d, BR):
            i = first + j
            kT = tl.trans(rows(key, m, t, i, C, d, Q))
            W = lk * block(weights, i, c, d, P) - dot(kT, ls[:, None] * Ew)
            if MOVES:
                S = block(moving, i, c, d, P)
                W += ld * S
                S = mk * S - dot(kT, ms[:, None] * Ew)
            tl.debug_barrier()
            store_block(weights, W, i, c, d, P)
            if ends:
                store_block(start, W, i, c, d, P)
            if MOVES:
                store_block(moving, S, i, c, d, P)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["N"])
def reading_kernel(
    key, value, query, keep, drift, share, gain, bias, kept, dout, hats, rstds, E0s, Ews, Ebs, dOs, dgts, dEws, dEbs,
    dkey, dquery, dkeep, ddrift, dshare, H, N, C, d, I, R, P, Q,
    FACTOR: tl.constexpr, EPS: tl.constexpr, BOUND: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr,
    SCALED: tl.constexpr, MOVES: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Of every chunk by itself: its errors again, and gradients of what its queries have read."""
    m = tl.program_id(0).to(tl.int64)
    h = m // N
    c, t, j = tl.arange(0, BD), tl.arange(0, BC), tl.arange(0, BR)
    at_row, in_row = m * C + t, t < C
    W0 = kept + m * (2 + MOVES) * R * P
    A0, S0 = W0 + R * P, W0 + 2 * R * P
    z = tl.zeros([BC, BD], tl.float32) + vector(A0, I - 1, c, P, BIASED, BD)[None, :]
    QW, QK = tl.zeros_like(z), tl.zeros([BC, BC], tl.float32)
    QS = QW
    if query is not None:
        QW += vector(W0, I - 1, c, P, BIASED, BD)[None, :]
        QK += BIASED
        if drift is not None:
            QS += vector(S0, I - 1, c, P, BIASED, BD)[None, :]
    for first in range(0, d, BR):
        i = first + j
        k = rows(key, m, t, i, C, d, Q)
        z += dot(k, block(A0, i, c, d, P))
        if query is not None:
            q = rows(query, m, t, i, C, d, Q)
            QK += dot(q, tl.trans(k))
            QW += dot(q, block(W0, i, c, d, P))
            if drift is not None:
                QS += dot(q, block(S0, i, c, d, P))
    K, v = rows(key, m, t, c, C, d, Q), rows(value, m, t, c, C, d, P)
    g0, beta = vector(gain, h % H, c, P, NORM, BD), vector(bias, h % H, c, P, NORM, BD)
    g = g0 + vector(A0, I, c, P, SCALED, BD)
    hat, rstd, E0 = missed(z, K, v, g, beta, c, d, FACTOR, EPS, NORM)
    E, _mgh, r, Es, rs = errors(hat, rstd, E0, K, g, c, d, BOUND, NORM)
    Ew, Eb = E * r[:, None], Es * rs[:, None]
    store_rows(E0s, E0, m, t, c, C, d, P)
    store_rows(Ews, Ew, m, t, c, C, d, P)
    if NORM:
        store_rows(hats, hat, m, t, c, C, d, P)
        tl.store(rstds + at_row, rstd, in_row)
    if SCALED:
        store_rows(Ebs, Eb, m, t, c, C, d, P)
    if query is not None:
        kp, sh, dO = row(keep, m, t, C), rows(share, m, t, t, C, C, C), rows(dout, m, t, c, C, d, P)
        by_scale = tl.zeros_like(kp)
        by_moving = by_scale
        if drift is not None:
            dr = row(drift, m, t, C)
        if NORM:
            sW, sS = vector(W0, I, c, P, SCALED, BD), g0
            O = kp[:, None] * QW - dot(sh * QK, Ew)
            gt = kp[:, None] * sW[None, :] + g0[None, :]
            if drift is not None:
                sS = vector(S0, I, c, P, SCALED, BD)
                O += dr[:, None] * QS
                gt += dr[:, None] * sS[None, :]
            if SCALED:
                gt -= dot(sh, Eb)
            hat, rstd = normal(O, c, d, EPS)
            dgt = dO * hat
            dO, _along = projected(dO * gt, hat, rstd, c, d)
            store_rows(dgts, dgt, m, t, c, C, d, P)
            if SCALED:
                by_scale = tl.sum(dgt * sW[None, :], 1)
                by_moving = tl.sum(dgt * sS[None, :], 1)
                store_rows(dEbs, -dot(tl.trans(sh), dgt), m, t, c, C, d, P)
        store_rows(dOs, dO, m, t, c, C, d, P)
        store_rows(dEws, -dot(tl.trans(sh * QK), dO), m, t, c, C, d, P)
        tl.store(dkeep + at_row, tl.sum(dO * QW, 1) + by_scale, in_row)
        if drift is not None:
            tl.store(ddrift + at_row, tl.sum(dO * QS, 1) + by_moving, in_row)
        tl.debug_barrier()
        dP, dPs = tl.zeros_like(QK), tl.zeros_like(QK)
        for first in range(0, d, BK):
            o = first + tl.arange(0, BK)
            dP -= dot(rows(dOs, m, t, o, C, d, P), tl.trans(rows(Ews, m, t, o, C, d, P)))
            if SCALED:
                dPs -= dot(rows(dgts, m, t, o, C, d, P), tl.trans(rows(Ebs, m, t, o, C, d, P)))
        store_rows(dshare, dP * QK + dPs, m, t, t, C, C, C)
        dQK = dP * sh
        for first in range(0, d, BI):
            i = first + tl.arange(0, BI)
            XW = tl.zeros([BC, BI], tl.float32)
            XS = XW
            for across in range(0, d, BK):
                o = across + tl.arange(0, BK)
                X = rows(dOs, m, t, o, C, d, P)
                XW += dot(X, tl.trans(block(W0, i, o, d, P)))
                if drift is not None:
                    XS += dot(X, tl.trans(block(S0, i, o, d, P)))
            dq = kp[:, None] * XW + dot(dQK, rows(key, m, t, i, C, d, Q))
            if drift is not None:
                dq += dr[:, None] * XS
            if NORM:
                dq += rows(dout, m, t, i, C, d, P)
            store_rows(dquery, dq, m, t, i, C, d, Q)
            store_rows(dkey, dot(tl.trans(dQK), rows(query, m, t, i, C, d, Q)), m, t, i, C, d, Q)


@triton.jit
def left(d_states, i, c, d, P, R, ends, MOVES: tl.constexpr):
    """Rows i of the gradients of W, A and S after a chunk."""
    dW, dA = block(d_states, i, c, d, P), block(d_states + R * P, i, c, d, P)
    # Of a chunk that ends, the weights after it are also where the next gradients are taken.
    dW, dA = tl.where(ends, dW + dA, dW), tl.where(ends, 0.0, dA)
    dS = dW
    if MOVES:
        dS = block(d_states + 2 * R * P, i, c, d, P)
    return dW, dA, dS


@triton.jit
def left_vector(states, d_states, i, c, P, R, ends, HAS: tl.constexpr, MOVES: tl.constexpr, BD: tl.constexpr):
    """The same of row i, or zeros; and how much of W and S is in them: of W in dW, of S in dW and in dS."""
    W, dW, dA = vector(states, i, c, P, HAS, BD), vector(d_states, i, c, P, HAS, BD), tl.zeros([BD], tl.float32)
    dA += vector(d_states + R * P, i, c, P, HAS, BD)
    dW, dA = tl.where(ends, dW + dA, dW), tl.where(ends, 0.0, dA)
    S, dS = W, dW
    if MOVES:
        S, dS = vector(states + 2 * R * P, i, c, P, HAS, BD), vector(d_states + 2 * R * P, i, c, P, HAS, BD)
    return dW, dA, dS, tl.sum(W * dW, 0), tl.sum(S * dW, 0), tl.sum(S * dS, 0)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    key, query, keep, drift, last_keep, last_drift, last_share, moving_keep, moving_share, full, anew, gain, kept,
    dout, d_states, hats, rstds, E0s, Ews, Ebs, dOs, dgts, dEws, dEbs, dzs, dkey, dvalue, dlast_keep, dlast_drift,
    dlast_share, dmoving_keep, dmoving_share, dgain, dbias, dfresh, H, N, C, d, I, R, P, Q,
    FACTOR: tl.constexpr, EPS: tl.constexpr, BOUND: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr,
    SCALED: tl.constexpr, MOVES: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: gradients of the states, and through them of the errors."""
    h = tl.program_id(0).to(tl.int64)
    c, t, j = tl.arange(0, BD), tl.arange(0, BC), tl.arange(0, BR)
    d_states += h * (2 + MOVES) * R * P
    if dfresh is not None:
        dfresh += h * R * P
    g0 = vector(gain, h % H, c, P, NORM, BD)
    dg0, dbeta = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for back in range(N):
        n = N - 1 - back
        m = h * N + n
        at_row, in_row = m * C + t, t < C
        states = kept + m * (2 + MOVES) * R * P
        ends = tl.load(full + h // H * N + n) != 0
        dbW, dbA, dbS, in_keep, in_drift, in_moving = left_vector(
            states, d_states, I - 1, c, P, R, ends, BIASED, MOVES, BD
        )
        dsW, dsA, dsS, keep_too, drift_too, moving_too = left_vector(
            states, d_states, I, c, P, R, ends, SCALED, MOVES, BD
        )
        in_keep, in_drift, in_moving = in_keep + keep_too, in_drift + drift_too, in_moving + moving_too
        # What the chunk has left.
        M = tl.zeros([BC, BD], tl.float32) + dbW[None, :]
        MS = M
        if MOVES:
            MS = tl.zeros_like(M) + dbS[None, :]
        for first in range(0, d, BR):
            i = first + j
            k, W = rows(key, m, t, i, C, d, Q), block(states, i, c, d, P)
            dW, dA, dS = left(d_states, i, c, d, P, R, ends, MOVES)
            in_keep += tl.sum(W * dW)
            M += dot(k, dW)
            if MOVES:
                S = block(states + 2 * R * P, i, c, d, P)
                in_drift += tl.sum(S * dW)
                in_moving += tl.sum(S * dS)
                MS += dot(k, dS)
        ls, lk, Ew = row(last_share, m, t, C), tl.load(last_keep + m), rows(Ews, m, t, c, C, d, P)
        Eb = Ew
        in_share, dEw, dEb = tl.sum(Ew * M, 1), -ls[:, None] * M, tl.zeros_like(M)
        if query is not None:
            dEw += rows(dEws, m, t, c, C, d, P)
        if SCALED:
            Eb = rows(Ebs, m, t, c, C, d, P)
            in_share += tl.sum(Eb * dsW[None, :], 1)
            dEb -= ls[:, None] * dsW[None, :]
            if query is not None:
                dEb += rows(dEbs, m, t, c, C, d, P)
        tl.store(dlast_keep + m, in_keep)
        tl.store(dlast_share + at_row, -in_share, in_row)
        ld, mk, ms = lk, lk, ls
        if MOVES:
            ld, mk, ms = tl.load(last_drift + m), tl.load(moving_keep + m), row(moving_share, m, t, C)
            in_share = tl.sum(Ew * MS, 1)
            dEw -= ms[:, None] * MS
            if SCALED:
                in_share += tl.sum(Eb * dsS[None, :], 1)
                dEb -= ms[:, None] * dsS[None, :]
            tl.store(dlast_drift + m, in_drift)
            tl.store(dmoving_keep + m, in_moving)
            tl.store(dmoving_share + at_row, -in_share, in_row)
            dbS, dsS = mk * dbS + ld * dbW, mk * dsS + ld * dsW
        dbW, dsW = lk * dbW, lk * dsW
        # What the queries have read.
        kp, dr = ls, ls
        if query is not None:
            kp = row(keep, m, t, C)
            if drift is not None:
                dr = row(drift, m, t, C)
            if BIASED:
                dO = rows(dOs, m, t, c, C, d, P)
                dbW += tl.sum(kp[:, None] * dO, 0)
                if drift is not None:
                    dbS += tl.sum(dr[:, None] * dO, 0)
            if NORM:
                dgt = rows(dgts, m, t, c, C, d, P)
                dg0 += tl.sum(dgt, 0)
                dbeta += tl.sum(rows(dout, m, t, c, C, d, P), 0)
                if SCALED:
                    dsW += tl.sum(kp[:, None] * dgt, 0)
                    if drift is not None:
                        dsS += tl.sum(dr[:, None] * dgt, 0)
        # The gradients at A, differentiated.
        K, E0 = rows(key, m, t, c, C, d, Q), rows(E0s, m, t, c, C, d, P)
        g, hat, rstd = g0, E0, ls
        if NORM:
            hat, rstd = rows(hats, m, t, c, C, d, P), row(rstds, m, t, C)
            if SCALED:
                g += vector(states + R * P, I, c, P, SCALED, BD)
        E, mgh, r, Es, rs = errors(hat, rstd, E0, K, g, c, d, BOUND, NORM)
        u, along = unbound(dEw, E, r)
        square = tl.sum(K * K, 1)
        shorter = along / tl.where(square > 0, square, 1.0)
        dv = -FACTOR * u
        dz = -dv
        if NORM:
            dG, by_G = projected(u, hat, rstd, c, d)
            steep = tl.sum(u * E, 1) * rstd / d
            dhat = -rstd[:, None] * (mgh[:, None] * u + by_G[:, None] * (E0 * g[None, :]))
            dE0 = dG * g[None, :]
            dg = dG * E0
            if SCALED:
                dEs, _along = unbound(dEb, Es, rs)
                dE0 += dEs * hat
                dhat += dEs * E0
            e = FACTOR * dE0
            dhat += e * g[None, :]
            dg += e * hat
            dg0 += tl.sum(dg, 0)
            dsA += SCALED * tl.sum(dg, 0)
            dbeta += tl.sum(e, 0)
            dv = -e
            dz, _along = projected(dhat, hat, rstd, c, d)
            dz -= steep[:, None] * hat
        dbA += BIASED * tl.sum(dz, 0)
        store_rows(dvalue, dv, m, t, c, C, d, P)
        store_rows(dzs, dz, h, t, c, C, d, P)
        tl.debug_barrier()
        # On to the states before the chunk, and to its keys.
        begins = False
        if anew is not None:
            begins = tl.load(anew + h // H * N + n) != 0
            if begins:
                bF, sF = vector(dfresh, I - 1, c, P, BIASED, BD), vector(dfresh, I, c, P, SCALED, BD)
                bF, sF = bF + dbW + dbA, sF + dsW + dsA
                tl.debug_barrier()
                store_vectors(dfresh, bF, sF, c, P, I, BIASED, SCALED)
                dbW, dbA, dbS = tl.zeros_like(dbW), tl.zeros_like(dbA), tl.zeros_like(dbS)
                dsW, dsA, dsS = tl.zeros_like(dsW), tl.zeros_like(dsA), tl.zeros_like(dsS)
        store_vectors(d_states, dbW, dsW, c, P, I, BIASED, SCALED)
        store_vectors(d_states + R * P, dbA, dsA, c, P, I, BIASED, SCALED)
        if MOVES:
            store_vectors(d_states + 2 * R * P, dbS, dsS, c, P, I, BIASED, SCALED)
        for first in range(0, d, BI):
            i = first + tl.arange(0, BI)
            k = rows(key, m, t, i, C, d, Q)
            dk = -shorter[:, None] * k
            if NORM:
                dk -= rows(dvalue, m, t, i, C, d, P)
            if query is not None:
                q = rows(query, m, t, i, C, d, Q)
                dk += rows(dkey, m, t, i, C, d, Q)
            for across in range(0, d, BK):
                o = across + tl.arange(0, BK)
                dW, dA, dS = left(d_states, i, o, d, P, R, ends, MOVES)
                Z, F = rows(dzs, h, t, o, C, d, P), rows(Ews, m, t, o, C, d, P)
                dA += dot(tl.trans(k), Z)
                dk += dot(Z, tl.trans(block(states + R * P, i, o, d, P))) - ls[:, None] * dot(F, tl.trans(dW))
                if MOVES:
                    dk -= ms[:, None] * dot(F, tl.trans(dS))
                    dS = mk * dS + ld * dW
                dW = lk * dW
                if query is not None:
                    X = rows(dOs, m, t, o, C, d, P)
                    dW += dot(tl.trans(q), kp[:, None] * X)
                    if drift is not None:
                        dS += dot(tl.trans(q), dr[:, None] * X)
                if anew is not None:
                    if begins:
                        D = block(dfresh, i, o, d, P) + dW + dA
                        tl.debug_barrier()
                        store_block(dfresh, D, i, o, d, P)
                        dW, dA, dS = tl.zeros_like(dW), tl.zeros_like(dA), tl.zeros_like(dS)
                tl.debug_barrier()
                store_block(d_states, dW, i, o, d, P)
                store_block(d_states + R * P, dA, i, o, d, P)
                if MOVES:
                    store_block(d_states + 2 * R * P, dS, i, o, d, P)
            store_rows(dkey, dk, m, t, i, C, d, Q)
        tl.debug_barrier()
    if NORM:
        tl.store(dgain + h * P + c, dg0, c < P)
        tl.store(dbias + h * P + c, dbeta, c < P)


def _constants(
    key: Tensor, width: int, inputs: int, norm: bool, scaled: bool, eps: float, factor: float, bound: float, moves: bool
) -> dict[str, Any]:
    tokens = power_of_2(key.shape[3])
    across = max(2 * tokens, power_of_2(width))
    return {
        "FACTOR": factor, "EPS": eps, "BOUND": bound, "NORM": norm, "BIASED": int(inputs > width),
        "SCALED": int(scaled), "MOVES": int(moves), "BC": tokens, "BD": across, "BR": ROWS,
        "num_warps": min(8, across // 8), "num_stages": 1,
    }  # fmt: skip


def _sizes(key: Tensor, value: Tensor, width: int, inputs: int, scaled: bool) -> tuple[int, ...]:
    return (*key.shape[1:4], width, inputs, inputs + scaled, value.shape[-1], key.shape[-1])


def _forward(
    key: Tensor, value: Tensor, query: Tensor | None, keep: Tensor, drift: Tensor | None, share: Tensor,
    last_keep: Tensor, last_drift: Tensor | None, last_share: Tensor, moving_keep: Tensor | None,
    moving_share: Tensor | None, gain: Tensor | None, bias: Tensor | None, fresh: Tensor | None, weights: Tensor,
    start: Tensor, moving: Tensor | None, full: Tensor, anew: Tensor | None, width: int, inputs: int, norm: bool,
    scaled: bool, eps: float, factor: float, bound: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = (
        key, value, query, keep, drift, share, last_keep, last_drift, last_share, moving_keep, moving_share, gain, bias,
        fresh, weights, start, moving, full, anew,
    )  # fmt: skip
    out, *_, kept = flat.fake(*given, width, inputs, norm, scaled, eps, factor, bound, save)
    after = flat.copies(key, weights, start, moving)
    launch(
        forward_kernel, (key.shape[0] * key.shape[1],), *map(dense, (*given[:11], full, anew, gain, bias, fresh)),
        *after[:2], None if moving is None else after[2], None if query is None else out, kept if save else None,
        *_sizes(key, value, width, inputs, scaled),
        **_constants(key, width, inputs, norm, scaled, eps, factor, bound, moving is not None),
    )  # fmt: skip
    return out, after[0], after[1], after[2], kept


def _backward(
    dout: Tensor | None, dweights: Tensor | None, dstart: Tensor | None, dmoving: Tensor | None,
    key: Tensor, value: Tensor, query: Tensor | None, keep: Tensor, drift: Tensor | None, share: Tensor,
    last_keep: Tensor, last_drift: Tensor | None, last_share: Tensor, moving_keep: Tensor | None,
    moving_share: Tensor | None, gain: Tensor | None, bias: Tensor | None, full: Tensor, anew: Tensor | None,
    kept: Tensor, freshly: bool, width: int, inputs: int, norm: bool, scaled: bool, eps: float, factor: float,
    bound: float,
) -> list[Tensor]:  # fmt: skip
    given = (
        key, value, query, keep, drift, share, last_keep, last_drift, last_share, moving_keep, moving_share, gain, bias
    )  # fmt: skip
    states, found, fresh = flat.room(given, kept, (dweights, dstart, dmoving), freshly)
    moves = kept.shape[3] == 3
    # (B, H, 2 or 3, R, P), as what is kept of a chunk.
    together = torch.stack(states if moves else states[:2], 2)
    reads = query is not None
    there = (norm, True, True, scaled, reads, reads and norm, reads, reads and scaled)
    hat, *rest = (value.new_empty(value.shape) if used else None for used in there)
    between = hat, value.new_empty(value.shape[:4]) if norm else None, *rest
    read = torch.zeros_like(value, memory_format=torch.contiguous_format) if dout is None else dense(dout)
    *tokens, gain, bias = map(dense, given)
    dkey, dvalue, dquery, dkeep, ddrift, dshare, *others = found
    sizes = _sizes(key, value, width, inputs, scaled)
    constants = _constants(key, width, inputs, norm, scaled, eps, factor, bound, moves)
    columns = min(constants["BD"], COLUMNS)
    heads = key.shape[0] * key.shape[1]
    launch(
        reading_kernel, (heads * key.shape[2],), *tokens[:6], gain, bias, kept, read,
        *between, dkey, dquery, dkeep, ddrift, dshare, *sizes, **constants,
        BI=min(constants["BD"], WIDE), BK=columns,
    )  # fmt: skip
    launch(
        backward_kernel, (heads,), tokens[0], *tokens[2:5], *tokens[6:], *map(dense, (full, anew)), gain, kept, read,
        together, *between, value.new_empty(heads, *value.shape[3:]), dkey, dvalue, *others, fresh, *sizes, **constants,
        BI=ROWS, BK=columns,
    )  # fmt: skip
    states[:] = [x.contiguous() for x in together.unbind(2)]
    return flat.gathered(key, states, found, fresh, moves)


BACKWARD = Primitive("altx_titans::learn_triton_backward", _backward, flat.fake_backward, device=DEVICE)
FORWARD = Primitive(
    "altx_titans::learn_triton", _forward, flat.fake, save=flat.save, backward=flat.differentiate(BACKWARD),
    keep="save", device=DEVICE,
)  # fmt: skip
flat.count_flops(torch.ops.altx_titans.learn_triton)


def run(*args: Any, **kwargs: Any) -> Any:
    """As `reference.learn`; one layer, no float64."""
    return flat.learn(FORWARD, *args, **kwargs)
