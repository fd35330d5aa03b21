"""Mamba-3 as one linear recurrence, shifted by a token: every backend of that op is one of this.

Letters as in `reference`, with g_t = l_t dt_t and s_t = (1 - l_t) dt_t for the weights of the trapezoid:

    h_t = a_t W_t + g_t k_t x_t^T,    W_t = h_{t-1} + s_t k_{t-1} x_{t-1}^T
                                          = a_{t-1} W_{t-1} + (g_{t-1} + s_t) k_{t-1} x_{t-1}^T

So W is a linear recurrence whose inputs at token t are those of t - 1 and the s of t; at the first token they are the
initial k and v with a = 1 and g = 0. And y_t = a_t W_t^T q_t + (g_t q_t k_t + D) x_t.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast
from altx_kernels.linear_recurrence import OP as RECURRENCE
from altx_kernels.op import REFERENCE, Backend
from altx_mamba.kernels.mamba3.angle import accumulate
from altx_mamba.kernels.mamba3.reference import TURN, Result, blank, rotate
from altx_mamba.kernels.mamba3.sequences import Sequences


class States(NamedTuple):
    """What is carried from token to token."""

    h: Tensor
    angle: Tensor
    k: Tensor
    v: Tensor


class Tokens(NamedTuple):
    """What the recurrence is made of, per head: x, log a, g, s, the turns, and B and C with their biases."""

    x: Tensor
    decay: Tensor
    new: Tensor
    old: Tensor
    turns: Tensor
    keys: Tensor
    queries: Tensor


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    initial_angle: Tensor | None = None,
    initial_k: Tensor | None = None,
    initial_v: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str,
) -> Result:
    """As `reference.mamba3`, with `backend` of linear-recurrence."""
    dtype = precise(x, dt, A, B, C, trap, angles, B_bias, C_bias, D, initial_state)
    rows = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    sizes = (B.shape[3], x.shape[3]), angles.shape[2:], B.shape[3:], x.shape[3:]
    given = (initial_state, initial_angle, initial_k, initial_v)
    before = States(*(
        x.new_zeros(rows, x.shape[2], *size, dtype=dtype) if state is None else state.to(dtype)
        for state, size in zip(given, sizes, strict=True)
    ))  # fmt: skip
    if not x.shape[1]:
        h, angle, k, v = (state.clone() for state in before)
        return x.clone(), h, angle, k, v
    out = x.dtype
    x, dt, A, trap, angles = (tensor.to(dtype) for tensor in (x, dt, A, trap, angles))
    if lengths is not None:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        x, dt, A, B, trap, angles = blank(padding, x, dt, A, B, trap, angles)
    tokens = Tokens(
        x=x,
        decay=dt * A,
        new=torch.sigmoid(trap) * dt,
        old=torch.sigmoid(-trap) * dt,
        turns=dt[..., None] * (math.pi * torch.tanh(angles))[:, :, None],
        keys=_per_head(B.to(dtype), B_bias.to(dtype)),
        queries=_per_head(C.to(dtype), C_bias.to(dtype)),
    )
    sequences = Sequences(x, reset, lengths, cu_seqlens)
    if x.shape[1] == 1 and cu_seqlens is None:
        y, h, angle, keys = _step(tokens, before, reset)
    else:
        y, h, angle, keys = _sequence(tokens, before, sequences, initial_angle is None, backend)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return y.to(out), h, angle, sequences.last_real(keys, before.k), sequences.last_real(x, before.v)


def _sequence(
    tokens: Tokens, before: States, sequences: Sequences, from_zero: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y without the skip, h and angle after the last token, and the rotated keys (B, T, H, N)."""
    x, decay, new, old, turns, keys, queries = tokens
    reset, cu_seqlens = sequences.reset, sequences.cu_seqlens
    angle = accumulate(turns, None if from_zero else sequences.carried(before.angle), sequences.fresh)
    keys, queries = rotate(keys, angle), rotate(queries, angle)
    zero = new.new_zeros(before.h.shape[:2])
    weight, g = sequences.shift(new, zero) + old, sequences.shift(decay, zero)
    k, v = sequences.shift(keys, before.k), sequences.shift(x, before.v) * weight[..., None]
    if reset is not None:
        g, k, v = blank(reset, g, k, v)
    # In float32 at least: the gradient of an angle is a small difference of large ones, which bfloat16 would lose.
    run = RECURRENCE.backends[backend].fn
    read, W = run(queries, k, v, g, initial_state=before.h, reset=reset, cu_seqlens=cu_seqlens)
    a = torch.exp(decay)
    y = read * a[..., None] + (new * (queries * keys).sum(-1))[..., None] * x
    k, v = sequences.last(keys, before.k) * sequences.last(new, zero)[..., None], sequences.last(x, before.v)
    h = sequences.last(a, zero + 1)[..., None, None] * W + k[..., None] * v[:, :, None]
    return y, h, sequences.last(angle, before.angle), keys


def _step(tokens: Tokens, before: States, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_sequence`, for one token of every row: the equations as they stand."""
    x, decay, new, old, turns, keys, queries = tokens
    h, angle, k, v = before
    if reset is not None:
        h, angle, k, v = blank(reset, *(state[:, None] for state in before))
        h, angle, k, v = (state[:, 0] for state in (h, angle, k, v))
    angle = torch.remainder(angle + turns[:, 0], TURN)
    key, query = rotate(torch.cat([keys, queries], 1), angle[:, None]).unbind(1)
    a = torch.exp(decay[:, 0])[..., None]
    inputs = torch.stack([(old[:, 0, :, None] * a) * k, new[:, 0, :, None] * key], 3)
    values = torch.stack([v, x[:, 0]], 2)
    with no_autocast(x.device):
        h = torch.baddbmm((a[..., None] * h).flatten(0, 1), inputs.flatten(0, 1), values.flatten(0, 1)).view(h.shape)
        y = (query[:, :, None] @ h).transpose(1, 2)
    return y, h, angle, key[:, None]


def unavailable(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str,
    **states: Tensor | None,
) -> str | None:
    """Why `backend` of linear-recurrence cannot run the call, or None."""
    # They look at shapes, dtypes, devices and whether gradients are wanted, and so do these.
    floats = [t for t in (x, dt, A, B, C, trap, angles, B_bias, C_bias, D, initial_state) if t is not None]
    like = x.new_empty(1, dtype=precise(*floats)).requires_grad_(any(t.requires_grad for t in floats))
    keys = like.expand(*x.shape[:3], B.shape[3])
    return RECURRENCE.backends[backend].unavailable(
        keys, keys, like.expand(x.shape), like.expand(dt.shape),
        initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _per_head(part: Tensor, bias: Tensor) -> Tensor:
    """B or C (B, T, G, N) of every head, with its bias (H, N): (B, T, H, N)."""
    return (part[:, :, :, None] + bias.reshape(part.shape[2], -1, part.shape[3])).flatten(2, 3)


BACKENDS = [
    Backend(name, partial(mamba3, backend=name), partial(unavailable, backend=name), backend.absent)
    for name, backend in RECURRENCE.backends.items()
    if name != REFERENCE
]
