"""Triton code that the kernels share: finding one's tokens, carrying states over pieces, sums over what follows."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.launching import Pieces, cut, launch

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def softplus(x):
    # log(1 + u) loses the digits of a small u.
    u = exp(-tl.abs(x))
    tail = tl.where(u < 0.03, u * (1 - u * (0.5 - u * (1 / 3 - u * 0.25))), tl.log(1 + u))
    # NaN is not lost: tl.maximum would drop it.
    return tl.where(x < 0, 0.0, x) + tail


@triton.jit
def sigmoid(x):
    return 1 / (1 + exp(-x))


@triton.jit
def piece(i, table, T, L, PACKED: tl.constexpr):
    """The sequence of piece i, its first token and its end, counted over all rows."""
    if PACKED:
        n = tl.load(table + 3 * i)
        start = tl.load(table + 3 * i + 1)
        stop = tl.load(table + 3 * i + 2)
    else:
        per = tl.cdiv(T, L)
        n = (i // per).to(tl.int64)
        start = n * T + (i % per) * L
        stop = tl.minimum(start + L, n * T + T)
    return n, start, stop


@triton.jit
def pieces_of(n, firsts, T, L, PACKED: tl.constexpr):
    """The first piece of sequence n and the first of the next."""
    if PACKED:
        first = tl.load(firsts + n)
        last = tl.load(firsts + n + 1)
    else:
        per = tl.cdiv(T, L)
        first = (n * per).to(tl.int64)
        last = first + per
    return first, last


@triton.jit(do_not_specialize=["T", "L"])
def carry_kernel(
    states, decays, initial, final, firsts, T, L, SIZE, DECAYS, OUTER, WIDTH, MOD, INNER,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, INITIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < SIZE
    d = (e // OUTER) * WIDTH + ((e % OUTER) % MOD) // INNER
    first, last = pieces_of(n, firsts, T, L, PACKED)
    S = tl.zeros([BLOCK], tl.float32)
    if INITIAL:
        S = tl.load(initial + n * SIZE + e, mask, 0.0).to(tl.float32)
    for j in range(last - first):
        i = first + j
        if REVERSE:
            i = last - 1 - j
        own = tl.load(states + i * SIZE + e, mask, 0.0)
        a = exp(tl.load(decays + i * DECAYS + d, mask, 0.0))
        tl.store(states + i * SIZE + e, S, mask)
        # What has decayed to nothing is nothing, were it infinite.
        S = tl.where(a == 0, 0.0, a * S) + own
    tl.store(final + n * SIZE + e, S, mask)


def carry(
    pieces: Pieces, states: Tensor, decays: Tensor, initial: Tensor | None, final: Tensor, *,
    inner: int, mod: int, outer: int, reverse: bool = False,
) -> None:  # fmt: skip
    """From what each piece adds to the state to the state that each piece begins with, in place.

    Args:
        states: (pieces, ...) float32.
        decays: (pieces, ...) float32, the logarithm of what a piece multiplies the state with. Element e of a state
            takes number (e // outer) * (numbers per outer) + (e % outer % mod) // inner of them.
        initial: (N, ...), the state before the first piece (after the last if reverse), or None.
        final: (N, ...) float32, receives the state after all.
    """
    size, number = states[0].numel(), decays[0].numel()
    block = 256
    launch(
        carry_kernel, (pieces.sequences, triton.cdiv(size, block)), states, decays, initial, final, pieces.firsts,
        pieces.tokens, pieces.length, size, number, outer, number // (size // outer), mod, inner,
        PACKED=pieces.firsts is not None, REVERSE=reverse, INITIAL=initial is not None, BLOCK=block, num_warps=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "L"])
def totals_kernel(x, totals, table, T, L, C, PACKED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    _, start, stop = piece(i, table, T, L, PACKED)
    t = start + tl.arange(0, ROWS)
    tile = tl.load(x + t[:, None] * C + c[None, :], (t < stop)[:, None] & (c < C)[None, :], 0.0)
    tl.store(totals + i * C + c, tl.sum(tile, 0), c < C)


@triton.jit(do_not_specialize=["T", "L"])
def suffix_kernel(
    x, y, totals, after, table, firsts, T, L, C, PACKED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n, start, stop = piece(i, table, T, L, PACKED)
    _, last = pieces_of(n, firsts, T, L, PACKED)
    rest = tl.load(after + n * C + c, c < C, 0.0)
    for j in range(i + 1, last):
        rest += tl.load(totals + j * C + c, c < C, 0.0)
    t = start + tl.arange(0, ROWS)
    mask = (t < stop)[:, None] & (c < C)[None, :]
    tile = tl.load(x + t[:, None] * C + c[None, :], mask, 0.0)
    tl.store(y + t[:, None] * C + c[None, :], tl.cumsum(tile, 0, reverse=True) + rest[None, :], mask)


def suffix_sums(x: Tensor, after: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What x (B, T, ...) float32 sums up to from each token to its sequence's end, and after (N, ...) once more."""
    x, after, channels = x.contiguous(), after.contiguous(), x[0, 0].numel()
    length = 64
    pieces = cut(x, cu_seqlens, length)
    y = torch.empty_like(x)
    totals = x.new_empty(pieces.count, channels)
    grid = (pieces.count, triton.cdiv(channels, 32))
    options = {"PACKED": pieces.table is not None, "ROWS": length, "BC": 32, "num_warps": 4}
    sizes = (pieces.tokens, pieces.length, channels)
    launch(totals_kernel, grid, x, totals, pieces.table, *sizes, **options)
    launch(suffix_kernel, grid, x, y, totals, after, pieces.table, pieces.firsts, *sizes, **options)
    return y
