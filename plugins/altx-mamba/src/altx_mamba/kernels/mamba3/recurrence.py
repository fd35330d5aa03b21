"""Mamba-3 as one linear recurrence, shifted by a token: every backend of that op is one of this.

Letters as in `reference`, with g_t = l_t dt_t and s_t = (1 - l_t) dt_t for the weights of the trapezoid:

    h_t = a_t W_t + g_t k_t x_t^T,    W_t = h_{t-1} + s_t k_{t-1} x_{t-1}^T
                                          = a_{t-1} W_{t-1} + (g_{t-1} + s_t) k_{t-1} x_{t-1}^T

So W is a linear recurrence whose inputs at token t are those of t - 1 and the s of t; at the first token they are the
initial k and v with a = 1 and g = 0. And y_t = a_t W_t^T q_t + (g_t q_t k_t + D) x_t.

On a CPU with a compiler the keys and queries come from `native`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast
from altx_kernels.linear_recurrence import OP as RECURRENCE
from altx_kernels.op import REFERENCE, Backend
from altx_mamba.kernels.mamba3 import native
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
    """What the recurrence is made of, in one dtype: x, log a, g and s, dt and what a dt of 1 turns, B and C."""

    x: Tensor
    decay: Tensor
    new: Tensor
    old: Tensor
    dt: Tensor
    turns: Tensor
    B: Tensor
    C: Tensor
    B_bias: Tensor
    C_bias: Tensor

    def per_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """The turns (B, T, H, R), and B and C with their biases (B, T, H, N): keys and queries that have not turned."""
        turns = self.dt[..., None] * self.turns[:, :, None]
        return turns, _per_head(self.B, self.B_bias), _per_head(self.C, self.C_bias)


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
        dt=dt,
        turns=math.pi * torch.tanh(angles),
        B=B.to(dtype),
        C=C.to(dtype),
        B_bias=B_bias.to(dtype),
        C_bias=C_bias.to(dtype),
    )
    sequences = Sequences(x, reset, lengths, cu_seqlens)
    D = None if D is None else D.to(dtype)
    if x.shape[1] == 1 and cu_seqlens is None:
        y, h, angle, keys = _step(tokens, before, D, reset)
        k = sequences.last_real(keys, before.k)
    elif backend == "native":
        y, h, angle, k = _native_sequence(tokens, before, D, sequences, initial_angle is None)
    else:
        y, h, angle, keys = _sequence(tokens, before, D, sequences, initial_angle is None, backend)
        k = sequences.last_real(keys, before.k)
    return y.to(out), h, angle, k, sequences.last_real(x, before.v)


def _sequence(
    tokens: Tokens, before: States, D: Tensor | None, sequences: Sequences, from_zero: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h and angle after the last token, and the rotated keys (B, T, H, N)."""
    x, (turns, keys, queries) = tokens.x, tokens.per_head()
    angle = accumulate(turns, None if from_zero else sequences.carried(before.angle), sequences.fresh)
    keys, queries = rotate(keys, angle), rotate(queries, angle)
    weight, g = _shifted(tokens, before, sequences)
    k, v = sequences.shift(keys, before.k), sequences.shift(x, before.v) * weight[..., None]
    if sequences.reset is not None:
        k, v = blank(sequences.reset, k, v)
    read, W = _recur(backend, queries, k, v, g, before, sequences)
    a = torch.exp(tokens.decay)
    y = read * a[..., None] + _skip(tokens.new * (queries * keys).sum(-1), D)[..., None] * x
    h = _last_state(W, sequences.last(keys, before.k), a, tokens, before, sequences)
    return y, h, sequences.last(angle, before.angle), keys


def _native_sequence(
    tokens: Tokens, before: States, D: Tensor | None, sequences: Sequences, from_zero: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_sequence`, in fewer passes over memory; the last key of each sequence instead of all."""
    weight, g = _shifted(tokens, before, sequences)
    a = torch.exp(tokens.decay)
    q, k, v, qk, last, angle = native.turn(
        tokens.x, tokens.dt, tokens.turns, tokens.B, tokens.C, tokens.B_bias, tokens.C_bias, a, weight,
        None if from_zero else before.angle, before.k, before.v,
        sequences.reset, sequences.lengths, sequences.cu_seqlens,
    )  # fmt: skip
    read, W = _recur("native", q, k, v, g, before, sequences)
    y = read.addcmul_(_skip(tokens.new * qk, D)[..., None], tokens.x)  # memory never touched before is slow
    # Where the last token is padding, `last` is the key of an earlier one, with a weight of 0.
    return y, _last_state(W, last, a, tokens, before, sequences), angle, last


def _shifted(tokens: Tokens, before: States, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The weight of what W takes in at each token, and the log of what it decays by: (B, T, H) both."""
    zero = tokens.new.new_zeros(before.h.shape[:2])
    weight, g = sequences.shift(tokens.new, zero) + tokens.old, sequences.shift(tokens.decay, zero)
    if sequences.reset is not None:
        (g,) = blank(sequences.reset, g)
    return weight, g


def _recur(
    backend: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, before: States, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """W^T q at each token, and W after the last."""
    # In float32 at least: the gradient of an angle is a small difference of large ones, which bfloat16 would lose.
    run = RECURRENCE.backends[backend].fn
    return run(q, k, v, g, initial_state=before.h, reset=sequences.reset, cu_seqlens=sequences.cu_seqlens)


def _skip(own: Tensor, D: Tensor | None) -> Tensor:
    """The factor of x_t in y_t, from g_t q_t k_t: (B, T, H)."""
    return own if D is None else own + D


def _last_state(W: Tensor, key: Tensor, a: Tensor, tokens: Tokens, before: States, sequences: Sequences) -> Tensor:
    """h after the last token, which is not in W yet."""
    zero = a.new_zeros(before.h.shape[:2])
    k, v = key * sequences.last(tokens.new, zero)[..., None], sequences.last(tokens.x, before.v)
    return sequences.last(a, zero + 1)[..., None, None] * W + k[..., None] * v[:, :, None]


def _step(
    tokens: Tokens, before: States, D: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_sequence`, for one token of every row: the equations as they stand."""
    x, decay, new, old, *_ = tokens
    turns, keys, queries = tokens.per_head()
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
    if D is not None:
        y = y + D[:, None] * x
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
    like = x.new_empty(1, dtype=precise(*floats), requires_grad=any(t.requires_grad for t in floats))
    keys = like.expand(*x.shape[:3], B.shape[3])
    return RECURRENCE.backends[backend].unavailable(
        keys, keys, like.expand(x.shape), like.expand(dt.shape),
        initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _per_head(part: Tensor, bias: Tensor) -> Tensor:
    """B or C (B, T, G, N) of every head, with its bias (H, N): (B, T, H, N)."""
    return (part[:, :, :, None] + bias.reshape(part.shape[2], -1, part.shape[3])).flatten(2, 3)


def _absent(backend: Backend[tuple[Tensor, Tensor]]) -> Callable[[], str | None]:
    """Why `backend` of linear-recurrence, or what goes with it here, runs nothing on this machine, or None."""
    if backend.name != "native":
        return backend.absent

    def absent() -> str | None:
        return backend.absent() or native.LIBRARY.problem()

    absent._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as Library.problem is
    return absent


BACKENDS = [
    Backend(name, partial(mamba3, backend=name), partial(unavailable, backend=name), _absent(backend))
    for name, backend in RECURRENCE.backends.items()
    if name != REFERENCE
]
