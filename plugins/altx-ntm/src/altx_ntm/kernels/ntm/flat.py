"""The time loop's arguments one by one, as primitives take them: what native.py and triton.py have in common.

A primitive takes 12 parameters (those of read heads, those of write heads, erase, add), 3 slots, 3 fresh ones, mask,
reset, write_first, and whether to keep what its adjoint needs. It returns what was read, 3 slots, and for the adjoint
checkpoints of the memory and the addresses after every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from altx_kernels.primitive import Primitive
from altx_ntm.kernels.ntm.reference import Heads, Slots, Writes, in_precision

Maybe = Tensor | None


def scan(
    node: Primitive,
    slots: Slots,
    fresh: Slots,
    reads: Heads | None,
    writes: Writes | None,
    write_first: bool,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Slots]:
    """As `reference.scan`, by a primitive."""
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
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    read, memory, read_address, write_address, *_ = node(*tensors, mask, reset, write_first, keep)
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


def dense(value: Maybe) -> Maybe:
    return None if value is None else value.contiguous()


def joined(read_address: Maybe, write_address: Maybe) -> Maybe:
    """(B, R+V, N) addresses of all heads, those that read first."""
    return None if read_address is None or write_address is None else torch.cat([read_address, write_address], 1)


def sizes(parameters: list[Maybe], memory: Tensor) -> tuple[int, ...]:
    """B, T, N, W, R, V and the numbers of shifts."""
    read_key, read_shift, write_key, write_shift = (parameters[i] for i in (0, 3, 5, 8))
    key = read_key if read_key is not None else write_key
    assert key is not None
    readers = (0, 1) if read_key is None or read_shift is None else (read_key.shape[2], read_shift.shape[3])
    writers = (0, 1) if write_key is None or write_shift is None else (write_key.shape[2], write_shift.shape[3])
    return (*memory.shape[:1], key.shape[1], *memory.shape[1:], readers[0], writers[0], readers[1], writers[1])


def results(
    parameters: list[Maybe],
    memory: Tensor,
    read_address: Tensor,
    write_address: Tensor,
    kept: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what a primitive returns.

    Args:
        kept: shape of a row's checkpoints, or None if nothing is kept.
    """
    batch, tokens, slots, width, readers, writers, *_ = sizes(parameters, memory)
    return (
        memory.new_empty(batch, tokens, readers, width),
        memory.new_empty(memory.shape),
        memory.new_empty(read_address.shape),
        memory.new_empty(write_address.shape),
        memory.new_empty(0) if kept is None else memory.new_empty(batch, *kept),
        memory.new_empty(0) if kept is None else memory.new_empty(batch, tokens, readers + writers, slots),
    )


def gradients(
    parameters: list[Maybe], like: Tensor, read_address: Tensor, write_address: Tensor, width: int, masked: bool
) -> list[Tensor]:
    """Room for gradients of parameters, slots and fresh ones; a masked token's stay 0."""
    room = like.new_zeros if masked else like.new_empty
    found = [like.new_empty(0) if p is None else room(p.shape) for p in parameters]
    states = [(len(like), read_address.shape[2], width), read_address.shape, write_address.shape]
    return found + [like.new_empty(size) for size in (*states, *states)]


def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.write_first, _ = inputs
    ctx.set_materialize_grads(False)
    parameters, (_memory, *states) = tensors[:12], tensors[12:]
    ctx.save_for_backward(*output[4:], *parameters, *states)


def differentiate(adjoint: Primitive) -> Callable[..., tuple[Any, ...]]:
    """The backward pass of a primitive.

    Args:
        adjoint: takes gradients of what was read and of the slots, any of them None, and what `save` keeps.
    """

    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        found = adjoint(*given[:4], *saved, ctx.write_first)
        present = [p is not None for p in saved[2:14]] + 3 * [True] + [t is not None for t in saved[16:19]]
        return (*(g if there else None for g, there in zip(found, present, strict=True)), None, None, None, None)

    return backward


def count_flops(op: Any) -> None:
    """Register how many flops a primitive takes: as the backend torch counts, for all do the same."""

    @register_flop_formula(op)
    def flops(*inputs, out_shape=None, **_) -> int:  # type: ignore[no-untyped-def]
        keys, shifts = (inputs[0], inputs[5]), (inputs[3], inputs[8])
        batch, slots, width = inputs[12]
        readers, writers = (key[2] if key else 0 for key in keys)
        looking = sum(key[2] * (2 * width + 12 + 2 * shift[-1]) for key, shift in zip(keys, shifts, strict=True) if key)
        per_slot = looking + 2 * width * (readers + 1) + 5 * width * writers
        return int(batch * out_shape[0][1] * slots * per_slot)
