"""Backend "native": C, chunk by chunk, and token by token where there are few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.packing import bounds
from altx_kernels.primitive import Primitive

LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"delta_rule": "p" * 13 + "i" * 15, "delta_rule_backward": "p" * 19 + "i" * 16},
)

CHUNK = 32  # tokens between two states that are kept for the backward pass, as in chunks.h
STATES = 1 << 18  # numbers of states that fit the second cache: of heads whose rows are read together, as they lie
COLUMNS = 32  # value channels that are worth a thread
SERIAL = 2_000_000  # multiplications that are not worth waking a thread for


def unavailable(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why it cannot run a call."""
    if q.device.type != "cpu":
        return f"q is on {q.device}, and native code runs on the CPU"
    return None


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None = None,
    *, initial_state: Tensor | None = None, reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference."""
    inputs = (q, k, v, a, b, g, initial_state)
    dtype = precise(*inputs)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    cast = (None if x is None else x.to(dtype) for x in inputs)
    y, state, _, _ = FORWARD(*cast, reset, cu_seqlens, keep)
    return y.to(v.dtype), state


def _forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, state, u, kept = _fake_forward(q, k, v, a, b, g, initial_state, reset, cu_seqlens, keep)
    rows, strides = _per_token(q, k, v, a, b, g)
    LIBRARY.call(
        "delta_rule", q.dtype, *rows, _dense(initial_state), _dense(reset), _bounds(q, cu_seqlens),
        y, state, u if keep else None, kept if keep else None,
        state.shape[0], q.shape[1], *state.shape[1:], *strides, _decay(g), *_work(v, state),
    )  # fmt: skip
    return y, state, u, kept


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, heads, width = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    matrix = (heads, width, v.shape[3])
    return (
        q.new_empty(v.shape),
        q.new_empty(sequences, *matrix),
        q.new_empty(v.shape if keep else (0,)),
        q.new_empty((batch * length // CHUNK + sequences, *matrix) if keep else (0,)),
    )


def _backward(
    dy: Tensor | None, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    g: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, u: Tensor, kept: Tensor, initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, da, db, dg, dinitial = _fake_backward(dy, dstate, q, k, v, a, b, g, reset, cu_seqlens, u, kept, initial)
    rows, strides = _per_token(q, k, v, a, b, g)
    batch, length = q.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    group, parts, threads = _work(v, kept[:sequences])
    if parts > 1:  # sums over a part of the value channels each, added in one order
        dq, dk, da, db, dg = (x.new_empty(parts, *x.shape) for x in (dq, dk, da, db, dg))
    LIBRARY.call(
        "delta_rule_backward", q.dtype, _dense(dy), _dense(dstate), *rows, _dense(reset), _bounds(q, cu_seqlens), u,
        kept, dq, dk, dv, da, db, None if g is None else dg, dinitial if initial else None,
        sequences, length, batch * length, *kept.shape[1:], *strides, _decay(g), group, parts, threads,
    )  # fmt: skip
    if parts > 1:
        dq, dk, da, db, dg = (x.sum(0) for x in (dq, dk, da, db, dg))
    return dq, dk, dv, da, db, dg, dinitial


def _fake_backward(
    dy: Tensor | None, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    g: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, u: Tensor, kept: Tensor, initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, dk, dv, da, db = (x.new_empty(x.shape) for x in (q, k, v, a, b))
    dg = q.new_empty((0,) if g is None else g.shape)
    return dq, dk, dv, da, db, dg, q.new_empty((sequences, *kept.shape[1:]) if initial else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, a, b, g, initial_state, reset, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, a, b, g, reset, cu_seqlens, *output[2:])
    ctx.initial = initial_state is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once, as checkpoints ask
    dq, dk, dv, da, db, dg, dinitial = BACKWARD(dy, dstate, *saved, ctx.initial)
    decay = None if saved[5] is None else dg
    return dq, dk, dv, da, db, decay, dinitial if ctx.initial else None, None, None, None


FORWARD = Primitive("altx::delta_rule", _forward, _fake_forward, save=_save, backward=_gradients, keep="keep")
BACKWARD = Primitive("altx::delta_rule_backward", _backward, _fake_backward)


def _per_token(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """The tensors (B, T, ...) with their last dimensions dense, copied where they were not, and strides per token."""
    rows: list[Tensor | None] = []
    strides = []
    for x in tensors:
        stride = 0
        if x is not None:
            batch, length, heads = x.shape[:3]
            s = x.stride()
            stride = s[0] if length == 1 else s[1]
            dense = s[2] == 1 if x.dim() == 3 else s[3] == 1 and (s[2] == x.shape[3] or heads == 1)
            if not dense or (batch > 1 and s[0] != length * stride):
                x = x.contiguous()
                stride = x[0, 0].numel() if x.numel() else 0
        rows.append(x)
        strides.append(stride)
    return rows, strides


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else bounds(x, cu_seqlens)


def _decay(g: Tensor | None) -> int:
    """NO_DECAY, PER_HEAD or PER_KEY of native.c."""
    return 0 if g is None else g.dim() - 2


def _work(v: Tensor, state: Tensor) -> tuple[int, int, int]:
    """How many heads make a task, into how many parts to cut its value channels, and on how many threads to work."""
    sequences, heads, width, values = state.shape
    threads = torch.get_num_threads() if v.numel() * width >= SERIAL else 1
    group = max(1, min(heads, STATES // max(1, width * values), sequences * heads // threads))
    pieces = -(-values // COLUMNS)
    wanted = 1 if threads == 1 else -(-threads // max(1, sequences * heads))
    return group, max(1, min(pieces, wanted)), threads
