"""The three layouts of a batch of sequences, and the ways between them.

padded: (B, T, ...) with a mask in any pattern.
compact: padded, with each row's real tokens moved to its start, in order.
packed: (1, T, ...), the sequences end to end, with cu_seqlens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (B, T, ...) at index (B, S): (B, S, ...)."""
    return torch.gather(x, 1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Orders that move each row's real tokens to its start, and back again. mask: (B, T) bool.

    Returns:
        (order, back), both (B, T) int64: `take(x, order)` is compact, `take(take(x, order), back)` is x.
    """
    order = torch.argsort(~mask, dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed x (1, T, ...) to right-padded (N, longest, ...) and its mask (N, longest)."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    step = torch.arange(longest, device=x.device)
    mask = step < lengths[:, None]
    index = (starts[:, None] + step).clamp(max=max(x.shape[1] - 1, 0))
    return x[0][index], mask


def repack(x: Tensor, mask: Tensor) -> Tensor:
    """Right-padded x (N, longest, ...) back to packed (1, T, ...)."""
    return x[mask][None]


def reverse(x: Tensor, mask: Tensor | None) -> Tensor:
    """Each row's real tokens in reverse order, masked tokens where they were; its own inverse."""
    if mask is None:
        return x.flip(1)
    order, back = compaction(mask)
    step = torch.arange(x.shape[1], device=x.device)
    length = mask.sum(1, keepdim=True)
    mirrored = torch.where(step < length, length - 1 - step, step)
    return take(take(take(x, order), mirrored), back)


def append(buffer: Tensor, new: Tensor, seen: Tensor, mask: Tensor | None, *, in_place: bool = False) -> Tensor:
    """Write the real tokens of `new` (B, T, ...) into `buffer` (B, S, ...), row b's from slot seen[b] on.

    The buffer grows to fit. With in_place it is written to as it is, and the caller vouches for the room.

    Returns:
        (B, S', ...) with S' >= S; the buffer itself when in_place.
    """
    batch, count = new.shape[:2]
    if count == 0 or batch == 0:
        return buffer
    lengths = torch.full_like(seen, count) if mask is None else mask.sum(1)
    if not in_place:
        room = max(int((seen + lengths).max()) - buffer.shape[1], 0)
        if room:
            buffer = torch.cat([buffer, buffer.new_zeros(batch, room, *buffer.shape[2:])], 1)
    new = new.to(buffer.dtype)
    trailing = [1] * (buffer.dim() - 2)
    if mask is None:
        slots = (seen[:, None] + torch.arange(count, device=new.device)).reshape(batch, count, *trailing)
        slots = slots.expand(-1, -1, *buffer.shape[2:])
        return buffer.scatter_(1, slots, new) if in_place else buffer.scatter(1, slots, new)
    source = torch.arange(buffer.shape[1], device=new.device) - seen[:, None]
    written = ((source >= 0) & (source < lengths[:, None])).reshape(batch, -1, *trailing)
    values = take(take(new, compaction(mask)[0]), source.clamp(0, count - 1))
    result = torch.where(written, values, buffer)
    return buffer.copy_(result) if in_place else result
