"""The time loop's arguments one by one, as primitives take them: what native.py and triton.py have in common.

A primitive takes 10 parameters (those of read heads, those of the write head), 6 slots, 6 fresh ones, mask, reset, and
whether to keep what its adjoint needs. It returns what was read, 6 slots, and for the adjoint checkpoints of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from altx_kernels.primitive import Primitive
from altx_ntm.kernels.dnc.cases import per_token
from altx_ntm.kernels.dnc.reference import Reads, Slots, Writes, in_precision

Maybe = Tensor | None


def scan(
    node: Primitive,
    slots: Slots,
    fresh: Slots,
    reads: Reads | None,
    writes: Writes | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Slots]:
    """As `reference.scan`, by a primitive."""
    dtype = slots.memory.dtype
    slots, fresh, reads, writes = in_precision(slots, fresh, reads, writes)
    if reads is None and writes is None:
        return slots.memory.new_zeros(len(slots.memory), 0, 0, slots.memory.shape[2]), slots
    parameters: list[Maybe] = [*(reads or 3 * (None,)), *(writes or 7 * (None,))]
    states: list[Maybe] = [*slots, *(6 * (None,) if reset is None else fresh)]
    tensors = [*parameters, *states]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    read, *after = node(*tensors, mask, reset, keep)
    return read.to(dtype), Slots(*after[:6])


def dense(values: Iterable[Maybe]) -> list[Maybe]:
    return [None if value is None else value.contiguous() for value in values]


def sizes(read_key: Maybe, key: Maybe, memory: Tensor, read_address: Tensor) -> tuple[int, int, int, int, int]:
    """B, T, N, W and R."""
    given = read_key if read_key is not None else key
    assert given is not None
    batch, slots, width = memory.shape
    return batch, given.shape[1], slots, width, read_address.shape[1]


def results(
    inputs: tuple[Any, ...], kept: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what a primitive returns.

    Args:
        inputs: its arguments.
        kept: how many checkpoints a row has, and of how many numbers; or None if nothing is kept.
    """
    memory, link, precedence, usage, read_address, write_address = inputs[10:16]
    batch, tokens, _, width, readers = sizes(inputs[0], inputs[3], memory, read_address)
    return (
        memory.new_empty(batch, tokens, 0 if inputs[0] is None else readers, width),
        memory.new_empty(memory.shape),
        memory.new_empty(link.shape),
        memory.new_empty(precedence.shape),
        memory.new_empty(usage.shape),
        memory.new_empty(read_address.shape),
        memory.new_empty(write_address.shape),
        memory.new_empty(0) if kept is None else memory.new_empty(batch, *kept),
    )


def gradients(
    parameters: tuple[Maybe, ...], like: Tensor, slots: int, readers: int, width: int, masked: bool
) -> list[Tensor]:
    """Room for gradients of parameters, slots and fresh ones; a masked token's stay 0."""
    room, batch = like.new_zeros if masked else like.new_empty, like.shape[0]
    found = [like.new_empty(0) if p is None else room(p.shape) for p in parameters]
    shapes = ((slots, width), (slots, slots), (slots,), (slots,), (readers, slots), (slots,))
    return found + [like.new_empty(batch, *shape) for shape in (*shapes, *shapes)]


def fake_gradients(*inputs: Any) -> list[Tensor]:
    """What an adjoint returns, from its arguments."""
    slots, readers, width = inputs[-3:]
    return gradients(inputs[8:18], inputs[7], slots, readers, width, False)


def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    parameters, (memory, *_), (read_address, _write), fresh = inputs[:10], inputs[10:14], inputs[14:16], inputs[16:22]
    ctx.set_materialize_grads(False)
    ctx.sizes = memory.shape[1], read_address.shape[1], memory.shape[2]
    ctx.save_for_backward(output[7], *parameters, *fresh, *inputs[22:24])


def differentiate(adjoint: Primitive) -> Callable[..., tuple[Any, ...]]:
    """The backward pass of a primitive.

    Args:
        adjoint: takes gradients of what was read and of the slots, any of them None, and what `save` keeps.
    """

    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        found = adjoint(*given[:7], *saved, *ctx.sizes)
        present = [p is not None for p in saved[1:11]] + 6 * [True] + [t is not None for t in saved[11:17]]
        return (*(g if there else None for g, there in zip(found, present, strict=True)), None, None, None)

    return backward


def count_flops(op: Any) -> None:
    """Register how many flops a primitive takes."""

    @register_flop_formula(op)
    def flops(*inputs, out_shape=None, **_) -> int:  # type: ignore[no-untyped-def]
        batch, slots, width = inputs[10]
        given = inputs[0] or inputs[3]
        return int(batch * given[1] * per_token(slots, width, inputs[14][1] if inputs[0] else 0))
