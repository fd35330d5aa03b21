"""What the Triton kernels of the loop over chunks do with a chunk's tokens (C, d) and with blocks of a state."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def normal(x, c, d, EPS: tl.constexpr):
    """x normalised, and 1 / deviation."""
    centred = tl.where((c < d)[None, :], x - (tl.sum(x, 1) / d)[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / d + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def projected(u, hat, rstd, c, d):
    """(u - mean u - hat mean(u hat)) rstd, and mean(u hat)."""
    along = tl.sum(u * hat, 1) / d
    result = (u - (tl.sum(u, 1) / d)[:, None] - along[:, None] * hat) * rstd[:, None]
    return tl.where((c < d)[None, :], result, 0.0), along


@triton.jit
def within(square, BOUND: tl.constexpr):
    """What an error is scaled down with to keep to the bound."""
    return 1 / tl.sqrt(tl.maximum(square / (BOUND * BOUND), 1.0))


@triton.jit
def unbound(d_bounded, E, r):
    """Of an error that was scaled with r = 1 / (|E| |k|), or 1; and what goes to k along k, over |k|^2."""
    along = tl.sum(E * d_bounded, 1)
    less = (r < 1)[:, None]
    square = tl.sum(E * E, 1)
    shrunk = r[:, None] * (d_bounded - (along / tl.where(r < 1, square, 1.0))[:, None] * E)
    return tl.where(less, shrunk, d_bounded), tl.where(r < 1, r * along, 0.0)


@triton.jit
def missed(z, k, v, g, beta, c, d, FACTOR: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr):
    """Of a chunk's tokens for outputs z: hat, 1 / deviation, and E0, or E without the norm."""
    hat, rstd = normal(z, c, d, EPS)
    E0 = FACTOR * (z - v)
    if NORM:
        E0 = FACTOR * (hat * g[None, :] + beta[None, :] + k - v)
    return hat, rstd, E0


@triton.jit
def errors(hat, rstd, E0, k, g, c, d, BOUND: tl.constexpr, NORM: tl.constexpr):
    """E, mean(G hat), r, and Es, r of the scale."""
    E, mgh = projected(E0 * g[None, :], hat, rstd, c, d)
    if not NORM:
        E = E0
    Es = E0 * hat
    r = tl.full([k.shape[0]], 1.0, tl.float32)
    rs = r
    if BOUND > 0:
        r = within(tl.sum(k * k, 1) * tl.sum(E * E, 1), BOUND)
        rs = within(tl.sum(Es * Es, 1), BOUND)
    return E, mgh, r, Es, rs


@triton.jit
def vector(state, row, c, P, HAS: tl.constexpr, BD: tl.constexpr):
    """A row of a state, or zeros."""
    x = tl.zeros([BD], tl.float32)
    if HAS:
        x += tl.load(state + row * P + c, c < P, 0.0)
    return x


@triton.jit
def store_vectors(state, b, s, c, P, I, BIASED: tl.constexpr, SCALED: tl.constexpr):
    """Rows of the bias and of the scale."""
    if BIASED:
        tl.store(state + (I - 1) * P + c, b, c < P)
    if SCALED:
        tl.store(state + I * P + c, s, c < P)


@triton.jit
def row(x, m, t, C):
    """A chunk's coefficients (C)."""
    return tl.load(x + m * C + t, t < C, 0.0)


@triton.jit
def rows(x, m, t, c, C, d, wide):
    """A chunk's vectors (C, d), `wide` numbers each."""
    return tl.load(x + (m * C + t)[:, None] * wide + c[None, :], (t < C)[:, None] & (c < d)[None, :], 0.0)


@triton.jit
def store_rows(x, values, m, t, c, C, d, wide):
    tl.store(x + (m * C + t)[:, None] * wide + c[None, :], values, (t < C)[:, None] & (c < d)[None, :])


@triton.jit
def block(state, i, c, d, P):
    """Rows i of a matrix."""
    return tl.load(state + i[:, None] * P + c[None, :], (i < d)[:, None] & (c < d)[None, :], 0.0)


@triton.jit
def store_block(state, x, i, c, d, P):
    tl.store(state + i[:, None] * P + c[None, :], x, (i < d)[:, None] & (c < P)[None, :])
