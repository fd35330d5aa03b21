"""The NTM's time loop in C, for CPUs: both orders, any heads, and an adjoint that keeps every CHUNK-th memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_ntm.kernels.ntm import flat
from altx_ntm.kernels.ntm.flat import Maybe
from altx_ntm.kernels.ntm.reference import Heads, Slots, Writes

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
    return flat.scan(FORWARD, slots, fresh, reads, writes, write_first, mask, reset)


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
    sizes = flat.sizes(parameters, memory)
    tokens, slots, width, readers, writers, *shifts = sizes[1:]
    padded, threads = _padded(slots), _threads(sizes)
    scratch = (2 * width + 2 * (readers + writers) + 5) * padded + max(shifts) + PAD
    states = (memory, read_address, write_address, fresh_memory, fresh_read_address, fresh_write_address)
    LIBRARY.call(
        "ntm", memory.dtype, *map(flat.dense, [*parameters, mask, reset, *states]), *results[:4],
        *(results[4:] if save else (None, None)), memory.new_empty(threads * scratch),
        *sizes, int(write_first), _chunk(tokens), scratch, threads,
    )  # fmt: skip
    return results


def _results(
    parameters: list[Maybe], memory: Tensor, read_address: Tensor, write_address: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns."""
    tokens, slots, width = flat.sizes(parameters, memory)[1:4]
    kept = (-(-tokens // _chunk(tokens)), width, _padded(slots)) if save else None
    return flat.results(parameters, memory, read_address, write_address, kept)


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
    width = checkpoints.shape[2]
    gradients = flat.gradients(parameters, checkpoints, read_address, write_address, width, mask is not None)
    sizes = flat.sizes(parameters, gradients[12])
    tokens, slots, _, readers, writers, *shifts = sizes[1:]
    padded, threads, chunk = _padded(slots), _threads(sizes), _chunk(tokens)
    scratch = (width * (chunk + 4 + writers) + 2 * readers + 3 * writers + 10) * padded + 2 * (max(shifts) + PAD)
    LIBRARY.call(
        "ntm_backward", checkpoints.dtype, *map(flat.dense, (d_read, d_memory, d_read_address, d_write_address)),
        checkpoints, addresses, *map(flat.dense, [*parameters, mask, reset]),
        torch.cat([read_address, write_address], 1), flat.dense(fresh_memory),
        flat.joined(fresh_read_address, fresh_write_address), *gradients, checkpoints.new_empty(threads * scratch),
        *sizes, int(write_first), chunk, scratch, threads,
    )  # fmt: skip
    return gradients


def _fake_backward(*inputs: Any) -> list[Tensor]:
    return flat.gradients(list(inputs[6:18]), inputs[4], inputs[18], inputs[19], inputs[4].shape[2], False)


BACKWARD = Primitive("altx_ntm::scan_backward", _backward, _fake_backward)
FORWARD = Primitive(
    "altx_ntm::scan", _forward, _fake, save=flat.save, backward=flat.differentiate(BACKWARD), keep="save"
)
flat.count_flops(torch.ops.altx_ntm.scan)
