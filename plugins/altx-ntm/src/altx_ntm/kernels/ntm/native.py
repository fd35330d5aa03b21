"""The NTM's time loop in C, for CPUs: both orders, any heads, and an adjoint that keeps every CHUNK-th memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_ntm.kernels.ntm.reference import Heads, Slots, Writes, in_precision

SIZES = 12 * "i"
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"ntm": (14 + 6 + 7) * "p" + SIZES, "ntm_backward": (6 + 14 + 3 + 12 + 6 + 1) * "p" + SIZES},
)

CHUNK = 16
"""Tokens between two memories that are kept for the adjoint."""

PAD = 16
"""As in native.c."""

SERIAL = 1 << 14
"""Numbers in the memories of all tokens below which a second thread costs more than it saves."""

Maybe = Tensor | None


def unavailable(slots: Slots, *_: Any, **__: Any) -> str | None:
    """Why it cannot run a call, or None."""
    device = slots.memory.device
    return None if device.type == "cpu" else f"the memory is on {device}, and native code runs on the CPU"


def scan(
    slots: Slots,
    fresh: Slots,
    reads: Heads | None,
    writes: Writes | None,
    *,
    write_first: bool = False,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Slots]:
    """As `reference.scan`."""
    dtype = slots.memory.dtype
    slots, fresh, reads, writes = in_precision(slots, fresh, reads, writes)
    if reads is None and writes is None:
        return slots.memory.new_zeros(len(slots.memory), 0, 0, slots.memory.shape[2]), slots
    parameters: list[Maybe] = [*(reads or 5 * (None,))]
    parameters += [*writes.heads, writes.erase, writes.add] if writes else 7 * [None]
    states: list[Maybe] = [slots.memory, _used(slots.read_address, reads), _used(slots.write_address, writes)]
    if reset is not None:
        reset = reset if mask is None else reset & mask
        states += [fresh.memory, _used(fresh.read_address, reads), _used(fresh.write_address, writes)]
    else:
        states += 3 * [None]
    tensors = [*parameters, *states]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    read, memory, read_address, write_address, *_ = FORWARD(*tensors, mask, reset, write_first, save)
    if reads is None:
        read_address = _idle(slots.read_address, fresh.read_address, reset)
    if writes is None:
        write_address = _idle(slots.write_address, fresh.write_address, reset)
    return read.to(dtype), Slots(memory, read_address, write_address)


def _used(address: Tensor, heads: Heads | Writes | None) -> Tensor:
    return address[:, :0] if heads is None else address


def _idle(address: Tensor, fresh: Tensor, reset: Tensor | None) -> Tensor:
    """The address of heads that do not move: only a reset does that."""
    return address if reset is None else torch.where(reset.any(1)[:, None, None], fresh, address)


def _dense(value: Maybe) -> Maybe:
    return None if value is None else value.contiguous()


def _sizes(parameters: list[Maybe], memory: Tensor) -> tuple[int, ...]:
    """B, T, N, W, R, V and the numbers of shifts."""
    read_key, read_shift, write_key, write_shift = (parameters[i] for i in (0, 3, 5, 8))
    key = read_key if read_key is not None else write_key
    assert key is not None
    readers = (0, 1) if read_key is None or read_shift is None else (read_key.shape[2], read_shift.shape[3])
    writers = (0, 1) if write_key is None or write_shift is None else (write_key.shape[2], write_shift.shape[3])
    return (*memory.shape[:1], key.shape[1], *memory.shape[1:], readers[0], writers[0], readers[1], writers[1])


def _threads(sizes: tuple[int, ...]) -> int:
    batch, tokens, slots, width = sizes[:4]
    return max(1, min(batch, torch.get_num_threads())) if batch * tokens * slots * width >= SERIAL else 1


def _padded(slots: int) -> int:
    return -(-slots // PAD) * PAD


def _chunk(tokens: int) -> int:
    return max(1, min(CHUNK, tokens))


def _forward(
    read_key: Tensor | None, read_strength: Tensor | None, read_gate: Tensor | None, read_shift: Tensor | None,
    read_sharpness: Tensor | None, write_key: Tensor | None, write_strength: Tensor | None, write_gate: Tensor | None,
    write_shift: Tensor | None, write_sharpness: Tensor | None, erase: Tensor | None, add: Tensor | None,
    memory: Tensor, read_address: Tensor, write_address: Tensor,
    fresh_memory: Tensor | None, fresh_read_address: Tensor | None, fresh_write_address: Tensor | None,
    mask: Tensor | None, reset: Tensor | None, write_first: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What was read, the slots after, and for the adjoint, else empty: checkpoints and addresses."""
    parameters = [
        read_key, read_strength, read_gate, read_shift, read_sharpness,
        write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add,
    ]  # fmt: skip
    results = _results(parameters, memory, read_address, write_address, save)
    sizes = _sizes(parameters, memory)
    tokens, slots, width, readers, writers, *shifts = sizes[1:]
    padded, threads = _padded(slots), _threads(sizes)
    scratch = (2 * width + 2 * (readers + writers) + 5) * padded + max(shifts) + PAD
    states = (memory, read_address, write_address, fresh_memory, fresh_read_address, fresh_write_address)
    LIBRARY.call(
        "ntm", memory.dtype, *map(_dense, [*parameters, mask, reset, *states]), *results[:4],
        *(results[4:] if save else (None, None)), memory.new_empty(threads * scratch),
        *sizes, int(write_first), _chunk(tokens), scratch, threads,
    )  # fmt: skip
    return results


def _results(
    parameters: list[Maybe], memory: Tensor, read_address: Tensor, write_address: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns."""
    batch, tokens, slots, width, readers, writers, *_ = _sizes(parameters, memory)
    chunks = -(-tokens // _chunk(tokens))
    return (
        memory.new_empty(batch, tokens, readers, width),
        memory.new_empty(memory.shape),
        memory.new_empty(read_address.shape),
        memory.new_empty(write_address.shape),
        memory.new_empty(batch, chunks, width, _padded(slots)) if save else memory.new_empty(0),
        memory.new_empty(batch, tokens, readers + writers, slots) if save else memory.new_empty(0),
    )


def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    memory, read_address, write_address = inputs[12:15]
    return _results(list(inputs[:12]), memory, read_address, write_address, inputs[-1])


def _backward(
    d_read: Tensor | None, d_memory: Tensor | None, d_read_address: Tensor | None, d_write_address: Tensor | None,
    checkpoints: Tensor, addresses: Tensor,
    read_key: Tensor | None, read_strength: Tensor | None, read_gate: Tensor | None, read_shift: Tensor | None,
    read_sharpness: Tensor | None, write_key: Tensor | None, write_strength: Tensor | None, write_gate: Tensor | None,
    write_shift: Tensor | None, write_sharpness: Tensor | None, erase: Tensor | None, add: Tensor | None,
    read_address: Tensor, write_address: Tensor,
    fresh_memory: Tensor | None, fresh_read_address: Tensor | None, fresh_write_address: Tensor | None,
    mask: Tensor | None, reset: Tensor | None, write_first: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the first 18 arguments of `_forward`, empty where there is none."""
    parameters = [
        read_key, read_strength, read_gate, read_shift, read_sharpness,
        write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add,
    ]  # fmt: skip
    gradients = _gradients(parameters, checkpoints, read_address, write_address, mask is not None)
    sizes = _sizes(parameters, gradients[12])
    tokens, slots, width, readers, writers, *shifts = sizes[1:]
    padded, threads, chunk = _padded(slots), _threads(sizes), _chunk(tokens)
    scratch = (width * (chunk + 4 + writers) + 2 * readers + 3 * writers + 10) * padded + 2 * (max(shifts) + PAD)
    fresh = None
    if fresh_read_address is not None and fresh_write_address is not None:
        fresh = torch.cat([fresh_read_address, fresh_write_address], 1)
    LIBRARY.call(
        "ntm_backward", checkpoints.dtype, *map(_dense, (d_read, d_memory, d_read_address, d_write_address)),
        checkpoints, addresses, *map(_dense, [*parameters, mask, reset]),
        torch.cat([read_address, write_address], 1), _dense(fresh_memory), fresh,
        *gradients, checkpoints.new_empty(threads * scratch), *sizes, int(write_first), chunk, scratch, threads,
    )  # fmt: skip
    return gradients


def _gradients(
    parameters: list[Maybe], checkpoints: Tensor, read_address: Tensor, write_address: Tensor, masked: bool
) -> list[Tensor]:
    """Room for what `_backward` returns."""
    room = checkpoints.new_zeros if masked else checkpoints.new_empty
    gradients = [checkpoints.new_empty(0) if p is None else room(p.shape) for p in parameters]
    batch, _, width, _ = checkpoints.shape
    states = [(batch, read_address.shape[2], width), read_address.shape, write_address.shape]
    return gradients + [checkpoints.new_empty(size) for size in (*states, *states)]


def _fake_backward(*inputs: Any) -> list[Tensor]:
    return _gradients(list(inputs[6:18]), inputs[4], inputs[18], inputs[19], False)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.write_first, _ = inputs
    ctx.set_materialize_grads(False)
    parameters, (_memory, *states) = tensors[:12], tensors[12:]
    ctx.save_for_backward(*output[4:], *parameters, *states)


def _differentiate(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    result = BACKWARD(*gradients[:4], *saved, ctx.write_first)
    present = [p is not None for p in saved[2:14]] + 3 * [True] + [t is not None for t in saved[16:19]]
    return (*(g if there else None for g, there in zip(result, present, strict=True)), None, None, None, None)


BACKWARD = Primitive("altx_ntm::scan_backward", _backward, _fake_backward)
FORWARD = Primitive("altx_ntm::scan", _forward, _fake, save=_save, backward=_differentiate, keep="save")


@register_flop_formula(torch.ops.altx_ntm.scan)
def _flops(*inputs, out_shape=None, **_) -> int:  # type: ignore[no-untyped-def]
    """As the backend torch counts: what either does is the same."""
    keys, shifts = (inputs[0], inputs[5]), (inputs[3], inputs[8])
    batch, slots, width = inputs[12]
    readers, writers = (key[2] if key else 0 for key in keys)
    looking = sum(key[2] * (2 * width + 12 + 2 * shift[-1]) for key, shift in zip(keys, shifts, strict=True) if key)
    per_slot = looking + 2 * width * (readers + 1) + 5 * width * writers
    return int(batch * out_shape[0][1] * slots * per_slot)
