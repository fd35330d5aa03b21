"""The DNC's time loop in C, for CPUs, and an adjoint that keeps every CHUNK-th state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_ntm.kernels.dnc.cases import per_token
from altx_ntm.kernels.dnc.reference import Reads, Slots, Writes, in_precision

SIZES = 9 * "i"
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {
        "dnc": (12 + 6 + 6 + 1 + 6 + 2) * "p" + SIZES,
        "dnc_backward": (1 + 6 + 1 + 12 + 6 + 10 + 12 + 1) * "p" + SIZES,
    },
)

CHUNK = 16
"""Tokens between two states that are kept for the adjoint."""

PAD = 16
"""As in native.c."""

SERIAL = 1 << 14
"""Numbers in the states of all tokens below which a second thread costs more than it saves."""

Maybe = Tensor | None


def unavailable(slots: Slots, *_: Any, **__: Any) -> str | None:
    """Why it cannot run a call, or None."""
    device = slots.memory.device
    return None if device.type == "cpu" else f"the memory is on {device}, and native code runs on the CPU"


def scan(
    slots: Slots,
    fresh: Slots,
    reads: Reads | None,
    writes: Writes | None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Slots]:
    """As `reference.scan`."""
    dtype = slots.memory.dtype
    slots, fresh, reads, writes = in_precision(slots, fresh, reads, writes)
    if reads is None and writes is None:
        return slots.memory.new_zeros(len(slots.memory), 0, 0, slots.memory.shape[2]), slots
    parameters: list[Maybe] = [*(reads or 3 * (None,)), *(writes or 7 * (None,))]
    states: list[Maybe] = [*slots, *(6 * (None,) if reset is None else fresh)]
    tensors = [*parameters, *states]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    read, *after = FORWARD(*tensors, mask, reset, save)
    return read.to(dtype), Slots(*after[:6])


def _dense(values: Any) -> list[Maybe]:
    return [None if value is None else value.contiguous() for value in values]


def _sizes(read_key: Maybe, key: Maybe, memory: Tensor, readers: int) -> tuple[int, ...]:
    """B, T, N, W, R and the numbers of a padded state."""
    given = read_key if read_key is not None else key
    assert given is not None
    batch, slots, width = memory.shape
    across, down = _padded(slots), _padded(width)
    return batch, given.shape[1], slots, width, readers, slots * (down + across) + (readers + 3) * across


def _padded(size: int) -> int:
    return -(-size // PAD) * PAD


def _chunk(tokens: int) -> int:
    return max(1, min(CHUNK, tokens))


def _threads(batch: int, tokens: int, size: int) -> int:
    return max(1, min(batch, torch.get_num_threads())) if batch * tokens * size >= SERIAL else 1


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
    states = (
        memory, link, precedence, usage, read_address, write_address,
        fresh_memory, fresh_link, fresh_precedence, fresh_usage, fresh_read_address, fresh_write_address,
    )  # fmt: skip
    results = _results(*parameters, *states, mask, reset, save)
    sizes = _sizes(read_key, key, memory, read_address.shape[1])
    batch, tokens, slots, width, _, size = sizes
    threads = _threads(batch, tokens, size)
    scratch = 3 * size + 9 * _padded(slots) + _padded(width)
    LIBRARY.call(
        "dnc", memory.dtype, *_dense(parameters), *_dense((mask, reset)), *_dense(states), *results[:7],
        results[7] if save else None, memory.new_empty(threads * scratch), *sizes, _chunk(tokens), scratch, threads,
    )  # fmt: skip
    return results


def _results(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns."""
    memory, link, precedence, usage, read_address, write_address = inputs[10:16]
    batch, tokens, _, width, readers, size = _sizes(inputs[0], inputs[3], memory, read_address.shape[1])
    kept = (batch, -(-tokens // _chunk(tokens)), size) if inputs[-1] else (0,)
    return (
        memory.new_empty(batch, tokens, 0 if inputs[0] is None else readers, width),
        memory.new_empty(memory.shape),
        memory.new_empty(link.shape),
        memory.new_empty(precedence.shape),
        memory.new_empty(usage.shape),
        memory.new_empty(read_address.shape),
        memory.new_empty(write_address.shape),
        memory.new_empty(kept),
    )


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
    gradients = _gradients(parameters, checkpoints, slots, readers, width, mask is not None)
    last: list[Maybe] = [d_memory, d_link, d_precedence, d_usage, d_read_address, d_write_address]
    if any(d is not None for d in last):
        pairs = zip(last, gradients[10:16], strict=True)
        last = [torch.zeros_like(like) if d is None else d for d, like in pairs]
    sizes = _sizes(read_key, key, gradients[10], readers)
    batch, tokens, *_, size = sizes
    threads, chunk, across, down = _threads(batch, tokens, size), _chunk(tokens), _padded(slots), _padded(width)
    scratch = (chunk + 5) * size + 18 * across + 5 * max(across, down) + down + readers * width
    LIBRARY.call(
        "dnc_backward", checkpoints.dtype, *_dense((d_read,)), *_dense(last), checkpoints, *_dense(parameters),
        *_dense((mask, reset)), *_dense(fresh), *gradients, checkpoints.new_empty(threads * scratch), *sizes, chunk,
        scratch, threads,
    )  # fmt: skip
    return gradients


def _gradients(
    parameters: tuple[Maybe, ...], like: Tensor, slots: int, readers: int, width: int, masked: bool
) -> list[Tensor]:
    """Room for what `_backward` returns."""
    room, batch = like.new_zeros if masked else like.new_empty, like.shape[0]
    gradients = [like.new_empty(0) if p is None else room(p.shape) for p in parameters]
    shapes = ((slots, width), (slots, slots), (slots,), (slots,), (readers, slots), (slots,))
    return gradients + [like.new_empty(batch, *shape) for shape in (*shapes, *shapes)]


def _fake_backward(*inputs: Any) -> list[Tensor]:
    slots, readers, width = inputs[-3:]
    return _gradients(inputs[8:18], inputs[7], slots, readers, width, False)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    parameters, (memory, *_), (read_address, _write), fresh = inputs[:10], inputs[10:14], inputs[14:16], inputs[16:22]
    ctx.set_materialize_grads(False)
    ctx.sizes = memory.shape[1], read_address.shape[1], memory.shape[2]
    ctx.save_for_backward(output[7], *parameters, *fresh, *inputs[22:24])


def _differentiate(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    result = BACKWARD(*gradients[:7], *saved, *ctx.sizes)
    present = [p is not None for p in saved[1:11]] + 6 * [True] + [t is not None for t in saved[11:17]]
    return (*(g if there else None for g, there in zip(result, present, strict=True)), None, None, None)


BACKWARD = Primitive("altx_ntm::dnc_backward", _backward, _fake_backward)
FORWARD = Primitive("altx_ntm::dnc", _forward, _results, save=_save, backward=_differentiate, keep="save")


@register_flop_formula(torch.ops.altx_ntm.dnc)
def _flops(*inputs, out_shape=None, **_) -> int:  # type: ignore[no-untyped-def]
    batch, slots, width = inputs[10]
    given = inputs[0] or inputs[3]
    return int(batch * given[1] * per_token(slots, width, inputs[14][1] if inputs[0] else 0))
