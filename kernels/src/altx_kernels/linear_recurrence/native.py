"""The compiled backend: `native.c` behind torch.library, in float32 and float64 on the CPU."""

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
    {"forward": "p" * 10 + "i" * 13, "backward": "p" * 14 + "i" * 13, "step": "p" * 8 + "i" * 11},
)

CHUNK, CHUNK_CHANNEL = 64, 32
"""Tokens between kept states. With a decay per key channel pairs of tokens cost more, and so chunks are shorter."""

SERIAL = 1 << 18
"""Numbers of state times tokens up to which threads would cost more than they save."""


def unavailable(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, initial_state: Tensor | None = None,
    reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Native code runs on the CPU."""
    if v.device.type != "cpu":
        return f"v is on {v.device}, and native code runs on the CPU"
    if not q.shape[3] or not v.shape[3]:
        return "there are no channels"
    return None


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.linear_recurrence`."""
    dtype, out = precise(q, k, v, g, initial_state), v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    g = None if g is None else g.to(dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, initial_state))
    o, S, _ = FORWARD(q, k, v, g, initial_state, reset, cu_seqlens, keep)
    return (o if out == dtype else o.to(out)), S


def _by_token(x: Tensor) -> Tensor:
    """x (B, T, ...) with tokens at a fixed distance, each contiguous: x itself if it is, as slices of rows are."""
    if x.is_contiguous():
        return x
    inner = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1 and stride != inner:
            return x.contiguous()
        inner *= size
    return x if x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def _sequences(v: Tensor, cu_seqlens: Tensor | None) -> int:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _kept(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Shape of the states that are kept for the backward pass, at the least; see kept_at in native.c."""
    keys, values = q.shape[3], v.shape[3]
    wide = 128 // v.element_size()
    padded = _up(values, wide) if values <= 96 else min(_up(values, 64), _up(values, 96))
    return v.shape[0] * v.shape[1] // _chunk(g) + _sequences(v, cu_seqlens), v.shape[2], _up(keys, wide), padded


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _chunk(g: Tensor | None) -> int:
    return CHUNK_CHANNEL if g is not None and g.dim() == 4 else CHUNK


def _sizes(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, sequences: int) -> tuple[int, ...]:
    """What every C function takes after its pointers."""
    _, _, heads, values = v.shape
    decays, channel = (0, 0) if g is None else (g.stride(1), int(g.dim() == 4))
    return sequences, heads, *q.shape[2:], values, q.stride(1), k.stride(1), v.stride(1), decays, channel


def _threads(q: Tensor, v: Tensor) -> int:
    return torch.get_num_threads() if v.numel() * q.shape[3] > SERIAL else 1


def _splits(q: Tensor, v: Tensor, sequences: int, threads: int) -> int:
    """Tasks that the heads of a group are spread over: as few as keep all threads busy."""
    pairs, units = max(sequences * q.shape[2], 1), v.shape[2] // q.shape[2] * -(-v.shape[3] // 64)
    for splits in range(1, units):
        if pairs * splits >= 8 * threads or pairs * splits % threads == 0:
            return splits
    return max(units, 1)


def _forward_impl(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _by_token(q), _by_token(k), _by_token(v)
    g = None if g is None else _by_token(g)
    reset = None if reset is None else reset.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    sequences, threads = _sequences(v, cu_seqlens), _threads(q, v)
    o = torch.empty(v.shape, dtype=v.dtype)
    S = v.new_empty(sequences, v.shape[2], q.shape[3], v.shape[3])
    sizes = _sizes(q, k, v, g, sequences)
    if v.shape[1] == 1 and cu_seqlens is None and not keep:
        LIBRARY.call("step", v.dtype, q, k, v, g, reset, initial_state, o, S, *sizes, threads)
        return o, S, v.new_empty(0)
    kept = v.new_empty(_kept(q, v, g, cu_seqlens) if keep else 0)
    at = bounds(v, cu_seqlens)
    splits = _splits(q, v, sequences, threads)
    LIBRARY.call(
        "forward", v.dtype, q, k, v, g, reset, at, initial_state, o, S, kept if keep else None, *sizes, _chunk(g),
        splits, threads,
    )  # fmt: skip
    return o, S, kept


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    S = v.new_empty(_sequences(v, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), S, v.new_empty(_kept(q, v, g, cu_seqlens) if keep else 0)


def _backward_impl(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None,
    kept: Tensor, do: Tensor | None, dS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _by_token(q), _by_token(k), _by_token(v)
    g = None if g is None else _by_token(g)
    reset = None if reset is None else reset.contiguous()
    sequences, threads = _sequences(v, cu_seqlens), _threads(q, v)
    do = v.new_zeros(v.shape) if do is None else do.contiguous()
    dS = None if dS is None else dS.contiguous()
    splits = _splits(q, v, sequences, threads)
    dq, dk = (q.new_empty(splits, *q.shape) for _ in range(2))
    dg = v.new_zeros(0) if g is None else g.new_zeros(splits, *g.shape)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dS0 = v.new_empty(sequences, v.shape[2], q.shape[3], v.shape[3])
    at = bounds(v, cu_seqlens)
    LIBRARY.call(
        "backward", v.dtype, q, k, v, g, reset, at, kept, do, dS, dq, dk, dv, dg if g is not None else None, dS0,
        *_sizes(q, k, v, g, sequences), _chunk(g), splits, threads,
    )  # fmt: skip
    return _total(dq), _total(dk), dv, dg if g is None else _total(dg), dS0


def _total(parts: Tensor) -> Tensor:
    """The sum over the first axis; one part is not copied."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None,
    kept: Tensor, do: Tensor | None, dS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dS0 = v.new_empty(_sequences(v, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    dg = v.new_empty(0 if g is None else g.shape)
    return q.new_empty(q.shape), q.new_empty(k.shape), v.new_empty(v.shape), dg, dS0


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, initial_state, reset, cu_seqlens, _keep = inputs
    ctx.save_for_backward(q, k, v, g, reset, cu_seqlens, output[2])
    ctx.stateful = initial_state is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dS: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, reset, cu_seqlens, kept = ctx.saved_tensors
    dq, dk, dv, dg, dS0 = BACKWARD(q, k, v, g, reset, cu_seqlens, kept, do, dS)
    return dq, dk, dv, None if g is None else dg, dS0 if ctx.stateful else None, None, None, None


BACKWARD = Primitive("altx::linear_recurrence_backward", _backward_impl, _backward_fake)
FORWARD = Primitive(
    "altx::linear_recurrence", _forward_impl, _forward_fake, save=_save, backward=_differentiate, keep="keep"
)
