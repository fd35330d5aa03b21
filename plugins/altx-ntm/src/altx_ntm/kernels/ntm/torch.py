"""The time loop of order "read-write" for training: no autograd inside, and a backward pass written out.

In this order a token's read and write heads all look at M_{t-1}, so all are addressed in one batched call.
What concerns a head and not the memory is taken out of both loops and done for all tokens at once; what
concerns the memory stays inside, where it is in the cache.

Shapes: time first. M (T, B, N, W) memory before each token, w (T, B, H, N) addresses after it, the R read heads
first; key (T, B, H, W) of length beta; gate, sharpness (T, B, H, 1); shift (T, B, H, S), S = 2r+1; erase, add
(T, B, V, W) of the V write heads. hold, reset (T, B, 1, 1) bool: masked tokens, and those that start afresh.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from altx_ntm.kernels.ntm.reference import EPS, Heads, Slots, Writes, in_precision, unit

SHARED = 1 << 17
"""Numbers in the memories of a batch from which a CPU's threads should share the work of one token."""


def unavailable(
    slots: Slots, fresh: Slots, reads: Heads | None, writes: Writes | None, *, write_first: bool = False, **_: object
) -> str | None:
    """Why `scan` cannot run a call, or None."""
    if write_first:
        return "it addresses all heads at once, which order write-read does not allow"
    if reads is None or writes is None:
        return "it reads and writes in one loop"
    if not reads.key.shape[1]:
        return "there are no tokens"
    return None


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
    assert reads is not None and writes is not None
    key, strength, gate, shift, sharpness = (
        torch.cat(pair, 2).transpose(0, 1).contiguous() for pair in zip(reads, writes.heads, strict=True)
    )
    erase, add = writes.erase.transpose(0, 1).contiguous(), writes.add.transpose(0, 1).contiguous()
    hold = None
    if mask is not None:
        hold = ~mask.T[..., None, None]
        erase, add = erase.masked_fill(hold, 0), add.masked_fill(hold, 0)
        reset = None if reset is None or mask is None else reset & mask
    read, memory, address, *_ = _loop(
        strength * unit(key), gate, shift, sharpness, erase, add,
        slots.memory, torch.cat([slots.read_address, slots.write_address], 1),
        fresh.memory, torch.cat([fresh.read_address, fresh.write_address], 1),
        hold, None if reset is None else reset.T[..., None, None],
    )  # fmt: skip
    heads = reads.key.shape[2]
    if hold is not None:
        read = read.masked_fill(hold, 0)
    return read.transpose(0, 1).to(dtype), Slots(memory, address[:, :heads], address[:, heads:])


@contextmanager
def _threads_for(memory: Tensor) -> Iterator[None]:
    """One CPU thread where a token is little work: several would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    if threads == 1 or memory.device.type != "cpu" or memory.numel() >= SHARED:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Ring:
    """A buffer of slots on a circle: those at both ends are repeated, so that a shift is a window."""

    def __init__(self, like: Tensor, shifts: int) -> None:
        slots, reach = like.shape[-1], shifts // 2
        buffer = like.new_empty(*like.shape[:-1], slots + 2 * reach)
        self.slots = buffer[..., reach : reach + slots]
        self.ends = buffer[..., :reach], buffer[..., slots + reach :]
        self.sources = buffer[..., slots : slots + reach], buffer[..., reach : 2 * reach]
        self.windows = [buffer[..., start : start + slots] for start in range(2 * reach, -1, -1)]

    def shifted(self, weights: Sequence[Tensor], floor: Tensor, out: Tensor | None = None) -> Tensor:
        """Equation (8) plus `floor`: what is in `slots`, shifted with weights[j] by j - r."""
        for end, source in zip(self.ends, self.sources, strict=True):
            end.copy_(source)
        result = torch.addcmul(floor, weights[0], self.windows[0], out=out)
        for weight, window in zip(weights[1:], self.windows[1:], strict=True):
            result.addcmul_(weight, window)
        return result


def _columns(shift: Tensor) -> list[tuple[Tensor, ...]]:
    """The weights of each token's shifts, each (B, H, 1)."""
    return [column.unbind(0) for column in shift.movedim(-1, 1)[..., None].contiguous().unbind(0)]


@torch.library.custom_op("altx_ntm::loop", mutates_args=())
def _loop(
    key: Tensor, gate: Tensor, shift: Tensor, sharpness: Tensor, erase: Tensor, add: Tensor,
    memory: Tensor, address: Tensor, fresh_memory: Tensor, fresh_address: Tensor,
    hold: Tensor | None, reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Reads (T, B, R, W), last memory and address; for the backward pass M, w, cosines and 1 / |M|."""
    length, heads, writers = key.shape[0], key.shape[2], erase.shape[2]
    readers = heads - writers
    read, memories = key.new_empty(*key.shape[:2], readers, key.shape[3]), memory.new_empty(length, *memory.shape)
    addresses, cosines = (address.new_empty(length, *address.shape) for _ in range(2))
    inverses = address.new_empty(length, len(address), 1, address.shape[2])
    last, turned, writing = torch.empty_like(memory), memories.transpose(-1, -2), addresses[:, :, readers:]
    ring, columns, floor = _Ring(address, shift.shape[-1]), _columns(shift), address.new_full((), EPS)
    memories[0] = memory
    with _threads_for(last):
        for t in range(length):
            memory, new = memories[t], addresses[t]
            if reset is not None:
                torch.where(reset[t], fresh_memory, memory, out=memory)
                address = torch.where(reset[t], fresh_address, address)
            torch.sum(memory * memory, -1, out=inverses[t, :, 0]).add_(EPS**2).rsqrt_()
            cosine = torch.bmm(key[t], turned[t], out=cosines[t]).mul_(inverses[t])
            torch.lerp(address, torch.softmax(cosine, -1), gate[t], out=ring.slots)
            torch.softmax(ring.shifted(columns[t], floor).log_().mul_(sharpness[t]), -1, out=new)
            if hold is not None:
                torch.where(hold[t], address, new, out=new)
            address = new
            torch.bmm(new[:, :readers], memory, out=read[t])
            for v in range(writers):
                memory = _erased(memory, writing[t, :, v], erase[t, :, v])
            after = memories[t + 1] if t + 1 < length else last
            torch.baddbmm(memory, writing[t].transpose(1, 2), add[t], out=after)
    return read, last, address.clone(), memories, addresses, cosines, inverses


def _erased(memory: Tensor, address: Tensor, erase: Tensor) -> Tensor:
    """M (1 - w e^T) for one head; its own adjoint."""
    return torch.addcmul(memory, address[..., None], memory * erase[:, None], value=-1)


@torch.library.custom_op("altx_ntm::loop_backward", mutates_args=())
def _loop_backward(
    d_read: Tensor, d_last: Tensor, d_last_address: Tensor,
    memories: Tensor, addresses: Tensor, cosines: Tensor, inverses: Tensor,
    key: Tensor, gate: Tensor, shift: Tensor, sharpness: Tensor, erase: Tensor, add: Tensor,
    address: Tensor, fresh_address: Tensor, hold: Tensor | None, reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first ten arguments of `_loop`."""
    length, heads, writers = key.shape[0], key.shape[2], erase.shape[2]
    readers = heads - writers
    previous = torch.cat([address[None], addresses[:-1]])
    if reset is not None:
        previous = torch.where(reset, fresh_address, previous)
    content, ring = torch.softmax(cosines, -1), _Ring(addresses, shift.shape[-1])
    torch.lerp(previous, content, gate, out=ring.slots)
    shifted = ring.shifted(shift[..., None].unbind(-2), gate.new_full((), EPS))
    sharpening, addressing = addresses * sharpness / shifted, gate * content * inverses
    if hold is not None:
        sharpening.masked_fill_(hold, 0)
    cosines, stay, reading, writing = cosines * inverses, 1 - gate, addresses[:, :, :readers], addresses[:, :, readers:]

    d_key, d_erase, d_add = torch.empty_like(key), torch.empty_like(erase), torch.empty_like(add)
    d_gated, d_shifted = torch.empty_like(addresses), torch.empty_like(addresses)
    d_memory, d_address = d_last, d_last_address
    d_fresh_memory, d_fresh_address = torch.zeros_like(d_memory), torch.zeros_like(d_address)
    step, zero, back = _Ring(address, shift.shape[-1]), address.new_zeros(()), _columns(shift.flip(-1))
    with _threads_for(d_last):
        for t in reversed(range(length)):
            # Write: equations (3) and (4), the last head to erase first.
            torch.bmm(writing[t], d_memory, out=d_add[t])
            d_writing = torch.bmm(add[t], d_memory.transpose(1, 2))
            stages = [memories[t]]
            for v in range(writers - 1):
                stages.append(_erased(stages[-1], writing[t, :, v], erase[t, :, v]))
            for v in reversed(range(writers)):
                product = d_memory * stages[v]
                torch.bmm(writing[t, :, v : v + 1], product, out=d_erase[t, :, v : v + 1])
                d_writing[:, v : v + 1].sub_(torch.bmm(erase[t, :, v : v + 1], product.transpose(1, 2)))
                d_memory = _erased(d_memory, writing[t, :, v], erase[t, :, v])
            # Read: equation (2).
            d_reading = torch.bmm(d_read[t], memories[t].transpose(1, 2))
            d_memory.baddbmm_(reading[t].transpose(1, 2), d_read[t])
            # Address: equations (9), (8), (7), and (5) with (6).
            d_address = d_address + torch.cat([d_reading, d_writing], 1)
            mean = (addresses[t] * d_address).sum(-1, keepdim=True)
            step.slots.copy_(torch.mul(sharpening[t], d_address - mean, out=d_shifted[t]))
            gated = step.shifted(back[t], zero, out=d_gated[t])
            mean = (content[t] * gated).sum(-1, keepdim=True)
            similar = addressing[t] * (gated - mean)
            torch.bmm(similar, memories[t], out=d_key[t])
            d_memory.baddbmm_(similar.transpose(1, 2), key[t])
            d_memory.addcmul_((similar * cosines[t]).sum(1)[..., None], memories[t], value=-1)
            moved = stay[t] * gated
            d_address = moved if hold is None else torch.where(hold[t], d_address, moved)
            if reset is not None:
                d_fresh_memory += torch.where(reset[t], d_memory, 0)
                d_fresh_address += torch.where(reset[t], d_address, 0)
                d_memory, d_address = d_memory.masked_fill(reset[t], 0), d_address.masked_fill(reset[t], 0)

    d_gate = (d_gated * (content - previous)).sum(-1, keepdim=True)
    d_shift = torch.stack([(d_shifted * window).sum(-1) for window in ring.windows], -1)
    d_sharpness = (d_shifted * shifted * shifted.log()).sum(-1, keepdim=True) / sharpness
    return (
        d_key, d_gate, d_shift, d_sharpness, d_erase.neg_(), d_add, d_memory, d_address, d_fresh_memory, d_fresh_address
    )  # fmt: skip


@_loop.register_fake
def _(key, gate, shift, sharpness, erase, add, memory, address, fresh_memory, fresh_address, hold, reset):  # type: ignore[no-untyped-def]
    length, batch, heads, width = key.shape
    every = address.new_empty(length, *address.shape)
    return (
        key.new_empty(length, batch, heads - erase.shape[2], width), torch.empty_like(memory),
        torch.empty_like(address), memory.new_empty(length, *memory.shape),
        every, torch.empty_like(every), address.new_empty(length, batch, 1, address.shape[2]),
    )  # fmt: skip


@_loop_backward.register_fake
def _(d_read, d_last, d_last_address, memories, addresses, cosines, inverses, *inputs):  # type: ignore[no-untyped-def]
    like = (*inputs[:6], d_last, d_last_address, d_last, d_last_address)
    return tuple(torch.empty_like(tensor) for tensor in like)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *parameters, _memory, address, _fresh_memory, fresh_address, hold, reset = inputs
    ctx.set_materialize_grads(False)
    ctx.readers = output[0].shape[2]
    ctx.save_for_backward(*output[3:], *parameters, address, fresh_address, hold, reset)


def _backward(ctx, *gradients):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once, as checkpoints ask
    memories, addresses = saved[:2]
    length, batch, _, width = memories.shape
    shapes = (length, batch, ctx.readers, width), memories.shape[1:], addresses.shape[1:]
    # Of the seven outputs, the four that are only saved have no gradient.
    known = [memories.new_zeros(shape) if d is None else d for d, shape in zip(gradients, shapes, strict=False)]
    return *_loop_backward(*known, *saved), None, None


_loop.register_autograd(_backward, setup_context=_save)
for _device in ("cpu", "cuda"):
    _loop.register_autocast(_device, torch.float32)


@register_flop_formula(torch.ops.altx_ntm.loop)
def _flops(key, gate, shift, sharpness, erase, *_, out_shape=None, **__) -> int:  # type: ignore[no-untyped-def]
    """Addressing: about 2 N W and 12 N per head. Reading and the cosine's norms 2 N W each. Writing 5 N W per head."""
    length, batch, heads, width = key
    slots, writers = out_shape[3][2], erase[2]
    per_slot = heads * (2 * width + 12 + 2 * shift[-1]) + 2 * width * (heads - writers + 1) + 5 * width * writers
    return int(length * batch * slots * per_slot)
