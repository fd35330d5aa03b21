"""The DNC's time loop in C, for CPUs, and an adjoint that keeps every CHUNK-th state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_ntm.kernels.dnc import flat
from altx_ntm.kernels.dnc.flat import Maybe
from altx_ntm.kernels.dnc.reference import Reads, Slots, Writes

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
    return flat.scan(FORWARD, slots, fresh, reads, writes, mask, reset)


def _size(slots: int, width: int, readers: int) -> int:
    """Numbers of a padded state."""
    return (width + slots + readers + 3) * _padded(slots)


def _tape(slots: int, readers: int) -> int:
    """Numbers of what the adjoint of a token needs."""
    return (8 + 4 * readers) * _padded(slots)


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
    sizes = flat.sizes(read_key, key, memory, read_address)
    batch, tokens, slots, width, readers = sizes
    size = _size(slots, width, readers)
    threads = _threads(batch, tokens, size)
    scratch = 3 * size + _tape(slots, readers)
    LIBRARY.call(
        "dnc", memory.dtype, *flat.dense(parameters), *flat.dense((mask, reset)), *flat.dense(states), *results[:7],
        results[7] if save else None, memory.new_empty(threads * scratch), *sizes, size, _chunk(tokens), scratch,
        threads,
    )  # fmt: skip
    return results


def _results(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns."""
    tokens, slots, width, readers = flat.sizes(inputs[0], inputs[3], inputs[10], inputs[14])[1:]
    return flat.results(inputs, (-(-tokens // _chunk(tokens)), _size(slots, width, readers)) if inputs[-1] else None)


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
    gradients = flat.gradients(parameters, checkpoints, slots, readers, width, mask is not None)
    last: list[Maybe] = [d_memory, d_link, d_precedence, d_usage, d_read_address, d_write_address]
    if any(d is not None for d in last):
        pairs = zip(last, gradients[10:16], strict=True)
        last = [torch.zeros_like(like) if d is None else d for d, like in pairs]
    sizes = flat.sizes(read_key, key, gradients[10], gradients[14])
    batch, tokens, size = *sizes[:2], _size(slots, width, readers)
    threads, chunk = _threads(batch, tokens, size), _chunk(tokens)
    scratch = (chunk + 4) * size + chunk * _tape(slots, readers) + 4 * (readers + 1) * _padded(slots) + readers * width
    LIBRARY.call(
        "dnc_backward", checkpoints.dtype, *flat.dense((d_read, *last)), checkpoints,
        *flat.dense((*parameters, mask, reset, *fresh)), *gradients, checkpoints.new_empty(threads * scratch), *sizes,
        size, chunk, scratch, threads,
    )  # fmt: skip
    return gradients


BACKWARD = Primitive("altx_ntm::dnc_backward", _backward, flat.fake_gradients)
FORWARD = Primitive(
    "altx_ntm::dnc", _forward, _results, save=flat.save, backward=flat.differentiate(BACKWARD), keep="save"
)
flat.count_flops(torch.ops.altx_ntm.dnc)
