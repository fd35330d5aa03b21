"""The equations of Graves, Wayne & Danihelka 2014 (arXiv:1410.5401), token by token. Any dtype, any device.

| here      | paper            | shape        |
|-----------|------------------|--------------|
| memory    | M_t              | (B, N, W)    |
| address   | w_t              | (B, H, N)    |
| key       | k_t              | (B, H, W)    |
| strength  | beta_t           | (B, H, 1)    |
| gate      | g_t              | (B, H, 1)    |
| shift     | s_t(-r) .. s_t(r)| (B, H, 2r+1) |
| sharpness | gamma_t          | (B, H, 1)    |
| erase     | e_t              | (B, H, W)    |
| add       | a_t              | (B, H, W)    |

Over a sequence, each head parameter has a T axis after B. Deviations: EPS keeps the cosine of equation (6) and
the power of equation (9) differentiable at 0 (Collier & Beel 2018, arXiv:1807.08518, section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altx_kernels.arguments import precise

EPS = 1e-8


class Heads(NamedTuple):
    """Where heads look."""

    key: Tensor
    strength: Tensor
    gate: Tensor
    shift: Tensor
    sharpness: Tensor

    def at(self, t: int) -> Heads:
        """Of token t."""
        return Heads(*(value[:, t] for value in self))


class Writes(NamedTuple):
    """Where write heads look and what they do there."""

    heads: Heads
    erase: Tensor
    add: Tensor


class Slots(NamedTuple):
    """The memory and its heads' addresses between two tokens."""

    memory: Tensor
    read_address: Tensor
    write_address: Tensor


def in_precision(
    slots: Slots, fresh: Slots, reads: Heads | None, writes: Writes | None
) -> tuple[Slots, Slots, Heads | None, Writes | None]:
    """What `scan` takes, in the dtype that it computes in."""
    values = [*slots, *fresh, *(reads or ()), *(writes.heads if writes else ()), *(writes[1:] if writes else ())]
    dtype = precise(*values)
    if all(value.dtype == dtype for value in values):
        return slots, fresh, reads, writes

    def cast(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return [tensor.to(dtype) for tensor in tensors]

    reads = reads and Heads(*cast(reads))
    writes = writes and Writes(Heads(*cast(writes.heads)), writes.erase.to(dtype), writes.add.to(dtype))
    return Slots(*cast(slots)), Slots(*cast(fresh)), reads, writes


def unit(vector: Tensor) -> Tensor:
    """Vectors (..., W) at length 1; those much shorter than EPS stay near 0."""
    return vector * (vector.square().sum(-1, keepdim=True) + EPS**2).rsqrt()


def address(memory: Tensor, previous: Tensor, heads: Heads) -> Tensor:
    """Equations (5) to (9): the new address (B, H, N)."""
    similarity = unit(heads.key) @ unit(memory).transpose(-1, -2)
    content = torch.softmax(heads.strength * similarity, -1)
    gated = heads.gate * content + (1 - heads.gate) * previous
    reach = heads.shift.shape[-1] // 2
    rolls = torch.stack([gated.roll(offset, -1) for offset in range(-reach, reach + 1)], -1)
    shifted = (rolls @ heads.shift[..., None])[..., 0]
    # (x + EPS)^gamma / sum of the same, where the power itself would underflow for many slots.
    return torch.softmax(heads.sharpness * torch.log(shifted + EPS), -1)


def read(memory: Tensor, where: Tensor) -> Tensor:
    """Equation (2): (B, H, W)."""
    return where @ memory


def write(memory: Tensor, where: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Equations (3) and (4): all heads erase, then all add."""
    kept = torch.prod(1 - where[..., None] * erase[:, :, None], 1)
    return memory * kept + where.transpose(1, 2) @ add


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
    """Run over T tokens, in float32 or, if any argument is in float64, in that.

    Args:
        slots: before the first token.
        fresh: what the slots become at a token that resets.
        reads: (B, T, R, ...), or None to write only.
        writes: (B, T, H, ...), or None to read only.
        write_first: a token is written before it is read.
        mask: (B, T) bool; a masked token changes nothing and reads 0.
        reset: (B, T) bool; only counts where the token is real.

    Returns:
        What was read (B, T, R, W) in the memory's dtype, with R = 0 when writing only, and the slots after the last
        token in the dtype computed in.
    """
    dtype = slots.memory.dtype
    slots, fresh, reads, writes = in_precision(slots, fresh, reads, writes)
    batch, _, width = slots.memory.shape
    length = (reads.key if reads else writes.add if writes else slots.memory[:, :0]).shape[1]
    # Something to concatenate even where nothing is read.
    vectors = [slots.memory.new_zeros(batch, 0 if reads else length, reads.key.shape[2] if reads else 0, width)]
    for t in range(length):
        old = slots
        if reset is not None:
            slots = _choose(reset[:, t], fresh, slots)
        if writes and write_first:
            slots = _write(slots, writes, t)
        if reads:
            slots = slots._replace(read_address=address(slots.memory, slots.read_address, reads.at(t)))
            vector = read(slots.memory, slots.read_address)
            vectors.append((vector if mask is None else torch.where(mask[:, t, None, None], vector, 0))[:, None])
        if writes and not write_first:
            slots = _write(slots, writes, t)
        if mask is not None:
            slots = _choose(mask[:, t], slots, old)
    return torch.cat(vectors, 1).to(dtype), slots


def _write(slots: Slots, writes: Writes, t: int) -> Slots:
    where = address(slots.memory, slots.write_address, writes.heads.at(t))
    return slots._replace(memory=write(slots.memory, where, writes.erase[:, t], writes.add[:, t]), write_address=where)


def _choose(rows: Tensor, new: Slots, old: Slots) -> Slots:
    """New slots in the rows (B,) bool, old ones elsewhere."""
    return Slots(*(torch.where(rows[:, None, None], *pair) for pair in zip(new, old, strict=True)))
