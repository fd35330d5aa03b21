"""Addressing by content on a GPU, and its adjoint, for the time loops in Triton. M (N, W) is in registers."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from altx_kernels.gpu.common import exp

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def softmax(logits, real):
    """0 where it is not real."""
    logits = tl.where(real, logits, -INFINITY)
    powers = exp(logits - tl.max(logits, 0))
    return powers / tl.sum(powers, 0)


@triton.jit
def norms(M, floor):
    """1 / |M_n|, with `floor` under the root."""
    return tl.rsqrt(tl.sum(M * M, 1) + floor)


@triton.jit
def content(M, inverse, key, strength, floor, n, w, N, W):
    """The key that lies at `key` at length 1, its inverse length, cosines, and the softmax of strength times these."""
    unit = tl.load(key + w, w < W, 0.0)
    scale = tl.rsqrt(tl.sum(unit * unit, 0) + floor)
    unit *= scale
    cosine = tl.sum(M * unit[None, :], 1) * inverse
    return unit, scale, cosine, softmax(strength * cosine, n < N)


@triton.jit
def uncontent(dM, d_address, M, inverse, unit, scale, cosine, address, strength, d_key, d_strength, w, W):
    """Stores the gradients of key and strength at `d_key` and `d_strength`; dM with that of M added."""
    d_similar = address * (d_address - tl.sum(address * d_address, 0))
    tl.store(d_strength, tl.sum(d_similar * cosine, 0))
    d_cosine = d_similar * strength * inverse
    d_unit = tl.sum(d_cosine[:, None] * M, 0)
    tl.store(d_key + w, scale * (d_unit - unit * tl.sum(unit * d_unit, 0)), w < W)
    return dM + d_cosine[:, None] * unit[None, :] - (d_cosine * cosine * inverse)[:, None] * M
