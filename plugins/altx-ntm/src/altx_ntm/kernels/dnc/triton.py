"""The DNC's time loop on a GPU: a program walks through one row, whose states lie in memory.

As in native.c, a state is one vector: memory (N, W), link (N, N), precedence, usage, write address, read addresses
(R, N). Memory and addresses are worked on in registers, the link some rows at a time. The adjoint has every CHUNK-th
state and computes those between again.
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
from altx_ntm.kernels.addressing import content, norms, uncontent
from altx_ntm.kernels.dnc import flat, reference
from altx_ntm.kernels.dnc.reference import Reads, Slots, Writes

FLOOR = tl.constexpr(reference.EPS)
FINEST = tl.constexpr(1 / (reference.ALIKE * torch.finfo(torch.float32).eps))
EVEN = tl.constexpr(1.5 * 2**23)
"""A float32 that has this added and taken away is rounded to a whole number, as `torch.round` does."""
CHUNK = 16
"""Tokens between two states that are kept for the adjoint."""
TILE = 1 << 12
"""Numbers of a link in registers at once."""


@triton.jit
def copied(to, source, SIZE, BLOCK: tl.constexpr = 1024):
    for start in range(0, SIZE, BLOCK):
        e = start + tl.arange(0, BLOCK)
        tl.store(to + e, tl.load(source + e, e < SIZE, 0.0), e < SIZE)
    tl.debug_barrier()


@triton.jit
def sums(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def products(a, b):
    return a * b


@triton.jit
def ranked(usage, n, N, BN: tl.constexpr):
    """The place of each slot in the order of usage, the slot at each place, and products of the usages before these.

    Slots that are alike but for rounding keep their order; those that are not there come last.
    """
    rank = tl.where(n < N, (usage * FINEST + EVEN) - EVEN, float("inf"))
    alike = rank[:, None] == rank[None, :]
    first = (rank[:, None] < rank[None, :]) | (alike & (n[:, None] < n[None, :]))
    place = tl.sum(first.to(tl.int32), 0)
    # Usages that are NaN have no order.
    slot = tl.minimum(tl.sum(tl.where(place[:, None] == n[None, :], n[:, None], 0), 0), BN - 1)
    through = tl.associative_scan(tl.gather(usage, slot, 0), 0, products)
    before = tl.where(n > 0, tl.gather(through, tl.maximum(n - 1, 0), 0), 1.0)
    return place, slot, before


@triton.jit
def usage_of(old, free, i, n, N, W, R: tl.constexpr):
    """u_t of the state at `old`, and the share that free gates leave of it."""
    rest = old + N * W + N * N
    usage = tl.load(rest + N + n, n < N, 0.0)
    a = tl.load(rest + 2 * N + n, n < N, 0.0)
    retention = tl.full(usage.shape, 1.0, tl.float32)
    for r in range(R):
        retention *= 1 - tl.load(free + i * R + r) * tl.load(rest + (3 + r) * N + n, n < N, 0.0)
    return (usage + a - usage * a) * retention, retention


@triton.jit
def write_token(
    to, old, key, strength, erase, add, free, allocate, gate, i, n, w, N, W, R: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """The state at `to` becomes that after the write of token i, but for the read addresses."""
    at = n[:, None] * W + w[None, :]
    inside = (n < N)[:, None] & (w < W)[None, :]
    link = N * W
    rest = link + N * N
    M = tl.load(old + at, inside, 0.0)
    usage, _ = usage_of(old, free, i, n, N, W, R)
    place, _, before = ranked(usage, n, N, BN)
    allocated = (1 - usage) * tl.gather(before, place, 0)
    _, _, _, similar = content(M, norms(M, FLOOR), key + i * W, tl.load(strength + i), FLOOR, n, w, N, W)
    share = tl.load(allocate + i)
    where = tl.where(n < N, tl.load(gate + i) * (share * allocated + (1 - share) * similar), 0.0)
    gone = where[:, None] * tl.load(erase + i * W + w, w < W, 0.0)[None, :]
    tl.store(to + at, M * (1 - gone) + where[:, None] * tl.load(add + i * W + w, w < W, 0.0)[None, :], inside)
    precedence = tl.load(old + rest + n, n < N, 0.0)
    tl.store(to + rest + n, (1 - tl.sum(where, 0)) * precedence + where, n < N)
    tl.store(to + rest + N + n, usage, n < N)
    tl.store(to + rest + 2 * N + n, where, n < N)
    tl.debug_barrier()
    for start in range(0, N, BR):
        m = start + tl.arange(0, BR)
        tile = link + m[:, None] * N + n[None, :]
        there = (m < N)[:, None] & (n < N)[None, :]
        a = tl.load(to + rest + 2 * N + m, m < N, 0.0)[:, None]
        L = (1 - a - where[None, :]) * tl.load(old + tile, there, 0.0) + a * precedence[None, :]
        tl.store(to + tile, tl.where(m[:, None] == n[None, :], 0.0, L), there)
    tl.debug_barrier()


@triton.jit
def follow(state, reading, room, n, N, W, BN: tl.constexpr, BR: tl.constexpr):
    """f_t and b_t of the address at `reading`; `room` has N numbers."""
    where = tl.load(reading + n, n < N, 0.0)
    backward = tl.zeros([BN], tl.float32)
    for start in range(0, N, BR):
        m = start + tl.arange(0, BR)
        L = tl.load(state + N * W + m[:, None] * N + n[None, :], (m < N)[:, None] & (n < N)[None, :], 0.0)
        tl.store(room + m, tl.sum(L * where[None, :], 1), m < N)
        backward += tl.sum(L * tl.load(reading + m, m < N, 0.0)[:, None], 0)
    tl.debug_barrier()
    forward = tl.load(room + n, n < N, 0.0)
    # Nobody writes there again before all have read.
    tl.debug_barrier()
    return forward, backward


@triton.jit
def read_token(
    read, to, old, key, strength, modes, room, i, n, w, N, W, R: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """Reads of token i from the state at `to`, given the addresses before at `old`; stored unless `read` is None."""
    M = tl.load(to + n[:, None] * W + w[None, :], (n < N)[:, None] & (w < W)[None, :], 0.0)
    inverse = norms(M, FLOOR)
    first = N * W + N * N + 3 * N
    for r in range(R):
        j = i * R + r
        forward, backward = follow(to, old + first + r * N, room, n, N, W, BN, BR)
        _, _, _, similar = content(M, inverse, key + j * W, tl.load(strength + j), FLOOR, n, w, N, W)
        where = tl.load(modes + 3 * j) * backward + tl.load(modes + 3 * j + 1) * similar
        where += tl.load(modes + 3 * j + 2) * forward
        tl.store(to + first + r * N + n, where, n < N)
        if read is not None:
            tl.store(read + j * W + w, tl.sum(where[:, None] * M, 0), w < W)
    tl.debug_barrier()


@triton.jit
def step(
    read, to, old, read_key, read_strength, modes, key, strength, erase, add, free, allocate, gate, room, i, n, w,
    N, W, SIZE, R: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Token i: the state at `to` from that at `old`."""
    if key is None:
        copied(to, old, SIZE)
    else:
        write_token(to, old, key, strength, erase, add, free, allocate, gate, i, n, w, N, W, R, BN, BR)
        if read_key is None:
            copied(to + N * W + N * N + 3 * N, old + N * W + N * N + 3 * N, R * N)
    if read_key is not None:
        read_token(read, to, old, read_key, read_strength, modes, room, i, n, w, N, W, R, BN, BR)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    read_key, read_strength, modes, key, strength, erase, add, free, allocate, gate, states, mask, reset, read,
    checkpoints, room, T, N, W, SIZE, R: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """states (B, 3, SIZE): the first state, which becomes the last, room for another, and the fresh one."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    w = tl.arange(0, BW)
    states += b * 3 * SIZE
    room += b * N
    now = 0
    for t in range(T):
        i = b * T + t
        if checkpoints is not None:
            if t % CHUNK == 0:
                copied(checkpoints + (b * tl.cdiv(T, CHUNK) + t // CHUNK) * SIZE, states + now * SIZE, SIZE)
        real = True
        if mask is not None:
            real = tl.load(mask + i) != 0
        if real:
            old = now
            if reset is not None:
                old = tl.where(tl.load(reset + i) != 0, 2, now)
            now = 1 - now
            step(
                read, states + now * SIZE, states + old * SIZE, read_key, read_strength, modes, key, strength, erase,
                add, free, allocate, gate, room, i, n, w, N, W, SIZE, R, BN, BR,
            )  # fmt: skip
        elif read is not None:
            for r in range(R):
                tl.store(read + (i * R + r) * W + w, tl.zeros([BW], tl.float32), w < W)
    if now == 1:
        copied(states, states + SIZE, SIZE)


@triton.jit
def unread(
    d, d_read, after, old, key, strength, modes, d_key, d_strength, d_modes, room, i, n, w, N, W,
    R: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """From gradients at `d` of the state after token i to those of the state after its write."""
    at = n[:, None] * W + w[None, :]
    inside = (n < N)[:, None] & (w < W)[None, :]
    first = N * W + N * N + 3 * N
    M = tl.load(after + at, inside, 0.0)
    dM = tl.load(d + at, inside, 0.0)
    inverse = norms(M, FLOOR)
    for r in range(R):
        j = i * R + r
        d_where = tl.load(d + first + r * N + n, n < N, 0.0)
        if d_read is not None:
            vector = tl.load(d_read + j * W + w, w < W, 0.0)[None, :]
            d_where += tl.sum(M * vector, 1)
            dM += tl.load(after + first + r * N + n, n < N, 0.0)[:, None] * vector
        reading = old + first + r * N
        forward, backward = follow(after, reading, room, n, N, W, BN, BR)
        beta = tl.load(strength + j)
        unit, scale, cosine, similar = content(M, inverse, key + j * W, beta, FLOOR, n, w, N, W)
        tl.store(d_modes + 3 * j, tl.sum(d_where * backward, 0))
        tl.store(d_modes + 3 * j + 1, tl.sum(d_where * similar, 0))
        tl.store(d_modes + 3 * j + 2, tl.sum(d_where * forward, 0))
        d_similar = tl.load(modes + 3 * j + 1) * d_where
        dM = uncontent(
            dM, d_similar, M, inverse, unit, scale, cosine, similar, beta, d_key + j * W, d_strength + j, w, W
        )
        # f = L w, b = L^T w.
        d_backward = tl.load(modes + 3 * j) * d_where
        share = tl.load(modes + 3 * j + 2)
        where = tl.load(reading + n, n < N, 0.0)
        tl.store(room + n, d_where, n < N)
        tl.debug_barrier()
        d_old = tl.zeros([BN], tl.float32)
        for start in range(0, N, BR):
            m = start + tl.arange(0, BR)
            tile = N * W + m[:, None] * N + n[None, :]
            there = (m < N)[:, None] & (n < N)[None, :]
            L = tl.load(after + tile, there, 0.0)
            d_forward = share * tl.load(room + m, m < N, 0.0)
            d_old += tl.sum(L * d_forward[:, None], 0)
            # Its own rows only, which nobody else has to read: those of d_where are done with.
            tl.store(d + first + r * N + m, tl.sum(L * d_backward[None, :], 1), m < N)
            mine = tl.load(reading + m, m < N, 0.0)[:, None]
            dL = tl.load(d + tile, there, 0.0) + d_forward[:, None] * where[None, :] + mine * d_backward[None, :]
            tl.store(d + tile, dL, there)
        tl.debug_barrier()
        d_old += tl.load(d + first + r * N + n, n < N, 0.0)
        tl.debug_barrier()
        tl.store(d + first + r * N + n, d_old, n < N)
    tl.store(d + at, dM, inside)
    tl.debug_barrier()


@triton.jit
def unwrite(
    d, after, old, key, strength, erase, add, free, allocate, gate, d_key, d_strength, d_erase, d_add, d_free,
    d_allocate, d_gate, room, i, n, w, N, W, R: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """From gradients at `d` of the state after the write of token i to those of the state before."""
    at = n[:, None] * W + w[None, :]
    inside = (n < N)[:, None] & (w < W)[None, :]
    rest = N * W + N * N
    where = tl.load(after + rest + 2 * N + n, n < N, 0.0)
    dw = tl.load(d + rest + 2 * N + n, n < N, 0.0)
    # p_t
    precedence = tl.load(old + rest + n, n < N, 0.0)
    dp = tl.load(d + rest + n, n < N, 0.0)
    du = tl.load(d + rest + N + n, n < N, 0.0)
    dw += dp - tl.sum(dp * precedence, 0)
    dp *= 1 - tl.sum(where, 0)
    # L_t
    for start in range(0, N, BR):
        m = start + tl.arange(0, BR)
        tile = N * W + m[:, None] * N + n[None, :]
        there = (m < N)[:, None] & (n < N)[None, :]
        dL = tl.where(m[:, None] == n[None, :], 0.0, tl.load(d + tile, there, 0.0))
        L = tl.load(old + tile, there, 0.0)
        a = tl.load(after + rest + 2 * N + m, m < N, 0.0)[:, None]
        tl.store(room + m, tl.sum(dL * (precedence[None, :] - L), 1), m < N)
        dw -= tl.sum(dL * L, 0)
        dp += tl.sum(dL * a, 0)
        tl.store(d + tile, (1 - a - where[None, :]) * dL, there)
    tl.debug_barrier()
    dw += tl.load(room + n, n < N, 0.0)
    tl.store(d + rest + n, dp, n < N)
    # M_t
    M = tl.load(old + at, inside, 0.0)
    dM = tl.load(d + at, inside, 0.0)
    e = tl.load(erase + i * W + w, w < W, 0.0)[None, :]
    dw += tl.sum(dM * (tl.load(add + i * W + w, w < W, 0.0)[None, :] - M * e), 1)
    tl.store(d_erase + i * W + w, -tl.sum(dM * M * where[:, None], 0), w < W)
    tl.store(d_add + i * W + w, tl.sum(dM * where[:, None], 0), w < W)
    dM *= 1 - where[:, None] * e
    # w_t^w
    usage, retention = usage_of(old, free, i, n, N, W, R)
    place, slot, before = ranked(usage, n, N, BN)
    allocated = (1 - usage) * tl.gather(before, place, 0)
    inverse = norms(M, FLOOR)
    beta = tl.load(strength + i)
    unit, scale, cosine, similar = content(M, inverse, key + i * W, beta, FLOOR, n, w, N, W)
    g = tl.load(gate + i)
    share = tl.load(allocate + i)
    dw = tl.where(n < N, dw, 0.0)
    by_allocation = tl.sum(dw * allocated, 0)
    by_content = tl.sum(dw * similar, 0)
    tl.store(d_gate + i, share * by_allocation + (1 - share) * by_content)
    tl.store(d_allocate + i, g * (by_allocation - by_content))
    dM = uncontent(
        dM, g * (1 - share) * dw, M, inverse, unit, scale, cosine, similar, beta, d_key + i * W, d_strength + i, w, W
    )
    tl.store(d + at, dM, inside)
    # a_t, in the order of usage: `later` is the gradient of the product up to and with a place.
    d_allocated = tl.gather(g * share * dw, slot, 0)
    sorted_usage = tl.gather(usage, slot, 0)
    _, later = tl.associative_scan((sorted_usage, d_allocated * (1 - sorted_usage)), 0, sums, reverse=True)
    later = tl.where(n < BN - 1, tl.gather(later, tl.minimum(n + 1, BN - 1), 0), 0.0)
    du += tl.gather((later - d_allocated) * before, place, 0)
    # u_t
    u = tl.load(old + rest + N + n, n < N, 0.0)
    a = tl.load(old + rest + 2 * N + n, n < N, 0.0)
    for r in range(R):
        others = du * (u + a - u * a)
        for k in range(R):
            left = 1 - tl.load(free + i * R + k) * tl.load(old + rest + (3 + k) * N + n, n < N, 0.0)
            others *= tl.where(k == r, 1.0, left)
        tl.store(d_free + i * R + r, -tl.sum(others * tl.load(old + rest + (3 + r) * N + n, n < N, 0.0), 0))
        there = d + rest + (3 + r) * N + n
        tl.store(there, tl.load(there, n < N, 0.0) - others * tl.load(free + i * R + r), n < N)
    du *= retention
    tl.store(d + rest + N + n, du * (1 - a), n < N)
    tl.store(d + rest + 2 * N + n, du * (1 - u), n < N)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    d_read, d, checkpoints, read_key, read_strength, modes, key, strength, erase, add, free, allocate, gate, mask,
    reset, d_read_key, d_read_strength, d_modes, d_key, d_strength, d_erase, d_add, d_free, d_allocate, d_gate,
    d_fresh, states, sources, room, T, N, W, SIZE, R: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """states (B, CHUNK + 2, SIZE): a chunk's first, the one after each of its tokens, and the fresh one.

    sources (B, CHUNK) int64: which of them each token began with. d (B, SIZE), gradients of the last state, become
    those of the first.
    """
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    w = tl.arange(0, BW)
    states += b * (CHUNK + 2) * SIZE
    sources += b * CHUNK
    d += b * SIZE
    d_fresh += b * SIZE
    room += b * N
    chunks = tl.cdiv(T, CHUNK)
    for c in range(chunks):
        start = (chunks - 1 - c) * CHUNK
        stop = tl.minimum(start + CHUNK, T)
        copied(states, checkpoints + (b * chunks + chunks - 1 - c) * SIZE, SIZE)
        now = 0
        for t in range(start, stop):
            i = b * T + t
            real = True
            if mask is not None:
                real = tl.load(mask + i) != 0
            if real:
                if reset is not None:
                    now = tl.where(tl.load(reset + i) != 0, CHUNK + 1, now)
                tl.store(sources + t - start, now)
                old = states + now * SIZE
                now = t - start + 1
                step(
                    None, states + now * SIZE, old, read_key, read_strength, modes, key, strength, erase, add, free,
                    allocate, gate, room, i, n, w, N, W, SIZE, R, BN, BR,
                )  # fmt: skip
        tl.debug_barrier()
        for s in range(stop - start):
            t = stop - 1 - s
            i = b * T + t
            real = True
            if mask is not None:
                real = tl.load(mask + i) != 0
            if real:
                old = states + tl.load(sources + t - start) * SIZE
                after = states + (t - start + 1) * SIZE
                if read_key is not None:
                    unread(
                        d, d_read, after, old, read_key, read_strength, modes, d_read_key, d_read_strength, d_modes,
                        room, i, n, w, N, W, R, BN, BR,
                    )  # fmt: skip
                if key is not None:
                    unwrite(
                        d, after, old, key, strength, erase, add, free, allocate, gate, d_key, d_strength, d_erase,
                        d_add, d_free, d_allocate, d_gate, room, i, n, w, N, W, R, BN, BR,
                    )  # fmt: skip
                if reset is not None:
                    if tl.load(reset + i) != 0:
                        for first in range(0, SIZE, BN):
                            e = first + n
                            total = tl.load(d_fresh + e, e < SIZE, 0.0) + tl.load(d + e, e < SIZE, 0.0)
                            tl.store(d_fresh + e, total, e < SIZE)
                            tl.store(d + e, tl.zeros([BN], tl.float32), e < SIZE)
                        tl.debug_barrier()


def _options(slots: int, width: int) -> dict[str, Any]:
    """Blocks, and warps so that a thread holds 8 numbers of a small tile, 32 of the largest."""
    down, across = power_of_2(slots), power_of_2(width)
    rows = min(down, TILE // down)
    most = max(down * across, down * rows)
    return {"CHUNK": CHUNK, "BN": down, "BW": across, "BR": rows, "num_warps": max(1, min(8, most // 256))}


def _vector(state: Any) -> Tensor:
    """(B, SIZE) of memory, link, precedence, usage, read and write addresses."""
    memory, link, precedence, usage, read_address, write_address = state
    parts = (memory, link, precedence, usage, write_address, read_address)
    return torch.cat([part.reshape(len(memory), part[0].numel() if len(part) else 0) for part in parts], 1)


def _into(places: Any, vector: Tensor) -> None:
    """The tensors of a state, from what `_vector` makes of them."""
    memory, link, precedence, usage, read_address, write_address = places
    parts = (memory, link, precedence, usage, write_address, read_address)
    for part, numbers in zip(parts, vector.split([part[0].numel() for part in parts], 1), strict=True):
        part.copy_(numbers.view(part.shape))


def _forward(
    read_key: Tensor | None, read_strength: Tensor | None, modes: Tensor | None, key: Tensor | None,
    strength: Tensor | None, erase: Tensor | None, add: Tensor | None, free: Tensor | None, allocate: Tensor | None,
    gate: Tensor | None,
    memory: Tensor, link: Tensor, precedence: Tensor, usage: Tensor, read_address: Tensor, write_address: Tensor,
    fresh_memory: Tensor | None, fresh_link: Tensor | None, fresh_precedence: Tensor | None,
    fresh_usage: Tensor | None, fresh_read_address: Tensor | None, fresh_write_address: Tensor | None,
    mask: Tensor | None, reset: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What was read, the slots after, and for the adjoint, else empty: checkpoints."""
    parameters = (read_key, read_strength, modes, key, strength, erase, add, free, allocate, gate)
    state = (memory, link, precedence, usage, read_address, write_address)
    fresh = (fresh_memory, fresh_link, fresh_precedence, fresh_usage, fresh_read_address, fresh_write_address)
    results = _results(*parameters, *state, *fresh, mask, reset, save)
    batch, tokens, slots, width, readers = flat.sizes(read_key, key, memory, read_address)
    if not batch:
        return results
    first = _vector(state)
    size = first.shape[1]
    states = torch.stack([first, first, first if fresh_memory is None else _vector(fresh)], 1)
    launch(
        forward_kernel, (batch,), *flat.dense(parameters), states, *flat.dense((mask, reset)),
        None if read_key is None else results[0], results[7] if save else None, memory.new_empty(batch, slots),
        tokens, slots, width, size, R=readers, **_options(slots, width),
    )  # fmt: skip
    _into(results[1:7], states[:, 0])
    return results


def _results(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns."""
    tokens, slots, width, readers = flat.sizes(inputs[0], inputs[3], inputs[10], inputs[14])[1:]
    size = slots * (width + slots + 3 + readers)
    return flat.results(inputs, (-(-tokens // CHUNK), size) if inputs[-1] else None)


def _backward(
    d_read: Tensor | None, d_memory: Tensor | None, d_link: Tensor | None, d_precedence: Tensor | None,
    d_usage: Tensor | None, d_read_address: Tensor | None, d_write_address: Tensor | None, checkpoints: Tensor,
    read_key: Tensor | None, read_strength: Tensor | None, modes: Tensor | None, key: Tensor | None,
    strength: Tensor | None, erase: Tensor | None, add: Tensor | None, free: Tensor | None, allocate: Tensor | None,
    gate: Tensor | None,
    fresh_memory: Tensor | None, fresh_link: Tensor | None, fresh_precedence: Tensor | None,
    fresh_usage: Tensor | None, fresh_read_address: Tensor | None, fresh_write_address: Tensor | None,
    mask: Tensor | None, reset: Tensor | None, slots: int, readers: int, width: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the first 22 arguments of `_forward`, empty where there is none."""
    parameters = (read_key, read_strength, modes, key, strength, erase, add, free, allocate, gate)
    fresh = (fresh_memory, fresh_link, fresh_precedence, fresh_usage, fresh_read_address, fresh_write_address)
    gradients = flat.gradients(parameters, checkpoints, slots, readers, width, mask is not None)
    batch = len(checkpoints)
    given = read_key if read_key is not None else key
    assert given is not None
    if not batch:
        return gradients
    last = (d_memory, d_link, d_precedence, d_usage, d_read_address, d_write_address)
    d = _vector([torch.zeros_like(room) if g is None else g for g, room in zip(last, gradients[10:16], strict=True)])
    d_fresh, size = torch.zeros_like(d), d.shape[1]
    states = checkpoints.new_empty(batch, CHUNK + 2, size)
    if fresh_memory is not None:
        states[:, -1] = _vector(fresh)
    launch(
        backward_kernel, (batch,), *flat.dense((d_read,)), d, checkpoints, *flat.dense(parameters),
        *flat.dense((mask, reset)), *gradients[:10], d_fresh, states,
        torch.empty(batch, CHUNK, dtype=torch.int64, device=d.device), checkpoints.new_empty(batch, slots),
        given.shape[1], slots, width, size, R=readers, **_options(slots, width),
    )  # fmt: skip
    _into(gradients[10:16], d)
    _into(gradients[16:], d_fresh)
    return gradients


BACKWARD = Primitive("altx_ntm::dnc_triton_backward", _backward, flat.fake_gradients, device=DEVICE)
FORWARD = Primitive(
    "altx_ntm::dnc_triton", _forward, _results, save=flat.save, backward=flat.differentiate(BACKWARD), keep="save",
    device=DEVICE,
)  # fmt: skip
flat.count_flops(torch.ops.altx_ntm.dnc_triton)


def run(
    slots: Slots,
    fresh: Slots,
    reads: Reads | None,
    writes: Writes | None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Slots]:
    """As `reference.scan`."""
    return flat.scan(FORWARD, slots, fresh, reads, writes, mask, reset)
