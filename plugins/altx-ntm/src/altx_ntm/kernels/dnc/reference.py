"""The equations of Graves et al. 2016, Methods (doi:10.1038/nature20101), token by token. Any dtype, any device.

| here          | paper          | shape     |                                        |
|---------------|----------------|-----------|----------------------------------------|
| memory        | M_t            | (B, N, W) |                                        |
| link          | L_t            | (B, N, N) | [i, j]: i was written right after j    |
| precedence    | p_t            | (B, N)    | how much a slot was the last written   |
| usage         | u_t            | (B, N)    |                                        |
| read_address  | w_t^r,i        | (B, R, N) |                                        |
| write_address | w_t^w          | (B, N)    |                                        |
| reads.key     | k_t^r,i        | (B, R, W) |                                        |
| reads.strength| beta_t^r,i     | (B, R, 1) |                                        |
| reads.modes   | pi_t^i         | (B, R, 3) | backward, content, forward             |
| writes.key    | k_t^w          | (B, W)    |                                        |
| strength      | beta_t^w       | (B, 1)    |                                        |
| erase, add    | e_t, v_t       | (B, W)    |                                        |
| free          | f_t^i          | (B, R)    | gates that free what a head has read   |
| allocate      | g_t^a          | (B, 1)    | unused slot rather than similar one    |
| gate          | g_t^w          | (B, 1)    | whether to write                       |

Over a sequence, each parameter has a T axis after B. Deviations: EPS under the roots of the cosine, as in the authors'
code; usages are sorted at a resolution of ALIKE times
the dtype's, so that slots that are alike but for rounding keep their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altx_kernels.arguments import precise

EPS = 1e-6
ALIKE = 128


class Reads(NamedTuple):
    """What read heads look for."""

    key: Tensor
    strength: Tensor
    modes: Tensor


class Writes(NamedTuple):
    """What the write head looks for and does there."""

    key: Tensor
    strength: Tensor
    erase: Tensor
    add: Tensor
    free: Tensor
    allocate: Tensor
    gate: Tensor


class Slots(NamedTuple):
    """All that is carried from token to token."""

    memory: Tensor
    link: Tensor
    precedence: Tensor
    usage: Tensor
    read_address: Tensor
    write_address: Tensor


def in_precision(
    slots: Slots, fresh: Slots, reads: Reads | None, writes: Writes | None
) -> tuple[Slots, Slots, Reads | None, Writes | None]:
    """What `scan` takes, in the dtype that it computes in."""
    dtype = precise(*slots, *fresh, *(reads or ()), *(writes or ()))

    def cast(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return [tensor.to(dtype) for tensor in tensors]

    return Slots(*cast(slots)), Slots(*cast(fresh)), reads and Reads(*cast(reads)), writes and Writes(*cast(writes))


def unit(vector: Tensor) -> Tensor:
    """Vectors (..., W) at length 1; those much shorter than the root of EPS stay near 0."""
    return vector * (vector.square().sum(-1, keepdim=True) + EPS).rsqrt()


def content(memory: Tensor, key: Tensor, strength: Tensor) -> Tensor:
    """C(M, k, beta): the address (B, H, N) of what is like the keys (B, H, W)."""
    return torch.softmax(strength * (unit(key) @ unit(memory).transpose(-1, -2)), -1)


def used(usage: Tensor, write_address: Tensor, read_address: Tensor, free: Tensor) -> Tensor:
    """u_t: slots that were written are in use, unless all that a freeing head has read."""
    retention = torch.prod(1 - free[..., None] * read_address, 1)
    return (usage + write_address - usage * write_address) * retention


def allocation(usage: Tensor) -> Tensor:
    """a_t: the least used slot, or what is left of it. Differentiable but for the order."""
    ranks = (usage.detach() / (ALIKE * torch.finfo(usage.dtype).eps)).round()
    order = torch.argsort(ranks, dim=-1, stable=True)
    free_list = usage.gather(-1, order)
    before = torch.cat([torch.ones_like(free_list[:, :1]), torch.cumprod(free_list, -1)[:, :-1]], -1)
    return torch.zeros_like(usage).scatter(-1, order, (1 - free_list) * before)


def linked(link: Tensor, precedence: Tensor, where: Tensor) -> Tensor:
    """L_t."""
    new = (1 - where[:, :, None] - where[:, None]) * link + where[:, :, None] * precedence[:, None]
    return new * (1 - torch.eye(where.shape[1], dtype=new.dtype, device=new.device))


def write(slots: Slots, writes: Writes) -> Slots:
    """One token's write; each of `writes` (B, ...)."""
    memory, link, precedence, usage, read_address, write_address = slots
    usage = used(usage, write_address, read_address, writes.free)
    similar = content(memory, writes.key[:, None], writes.strength[:, None])[:, 0]
    where = writes.gate * (writes.allocate * allocation(usage) + (1 - writes.allocate) * similar)
    memory = memory * (1 - where[..., None] * writes.erase[:, None]) + where[..., None] * writes.add[:, None]
    link = linked(link, precedence, where)
    precedence = (1 - where.sum(-1, keepdim=True)) * precedence + where
    return Slots(memory, link, precedence, usage, read_address, where)


def read(slots: Slots, reads: Reads) -> tuple[Tensor, Slots]:
    """One token's reads, r_t (B, R, W); each of `reads` (B, R, ...)."""
    forward = slots.read_address @ slots.link.transpose(-1, -2)
    backward = slots.read_address @ slots.link
    similar = content(slots.memory, reads.key, reads.strength)
    modes = reads.modes
    where = modes[..., :1] * backward + modes[..., 1:2] * similar + modes[..., 2:] * forward
    return where @ slots.memory, slots._replace(read_address=where)


def scan(
    slots: Slots,
    fresh: Slots,
    reads: Reads | None,
    writes: Writes | None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Slots]:
    """Write and then read T tokens, in float32 or, if any argument is in float64, in that.

    Args:
        slots: before the first token.
        fresh: what the slots become at a token that resets.
        reads: (B, T, R, ...), or None to write only.
        writes: (B, T, ...), or None to read only.
        mask: (B, T) bool; a masked token changes nothing and reads 0.
        reset: (B, T) bool; only counts where the token is real.

    Returns:
        What was read (B, T, R, W) in the memory's dtype, with R = 0 when writing only, and the slots after the last
        token in the dtype computed in.
    """
    dtype = slots.memory.dtype
    slots, fresh, reads, writes = in_precision(slots, fresh, reads, writes)
    batch, _, width = slots.memory.shape
    length = (reads.key if reads else writes.key if writes else slots.memory[:, :0]).shape[1]
    # Something to concatenate even where nothing is read.
    vectors = [slots.memory.new_zeros(batch, 0 if reads else length, reads.key.shape[2] if reads else 0, width)]
    for t in range(length):
        old = slots
        if reset is not None:
            slots = _choose(reset[:, t], fresh, slots)
        if writes:
            slots = write(slots, Writes(*(value[:, t] for value in writes)))
        if reads:
            vector, slots = read(slots, Reads(*(value[:, t] for value in reads)))
            vectors.append((vector if mask is None else torch.where(mask[:, t, None, None], vector, 0))[:, None])
        if mask is not None:
            slots = _choose(mask[:, t], slots, old)
    return torch.cat(vectors, 1).to(dtype), slots


def _choose(rows: Tensor, new: Slots, old: Slots) -> Slots:
    """New slots in the rows (B,) bool, old ones elsewhere."""

    def one(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(rows.reshape(-1, *(1,) * (new.dim() - 1)), new, old)

    return Slots(*map(one, new, old))
