"""What the DNC's time loop may be called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altx_kernels import KernelError
from altx_kernels.arguments import check_floats, check_shapes
from altx_ntm.kernels.dnc.reference import Reads, Slots, Writes
from altx_ntm.kernels.sizes import fits

SHAPES = {
    "memory": "B N W", "link": "B N M", "precedence": "B N", "usage": "B N", "read_address": "B R N",
    "write_address": "B N",
}  # fmt: skip
READS = {"key": "B T R W", "strength": "B T R one", "modes": "B T R three"}
WRITES = {
    "key": "B T W", "strength": "B T one", "erase": "B T W", "add": "B T W", "free": "B T R", "allocate": "B T one",
    "gate": "B T one",
}  # fmt: skip


MOST_SLOTS = 128
LARGEST = 1 << 13
"""Numbers in a memory, both sides rounded up to powers of two, for which a GPU's program has registers."""


def too_large(slots: Slots, *_: Any, **__: Any) -> str | None:
    """Why slots and memory do not fit the registers of one program, or None."""
    count, width = slots.memory.shape[1:]
    if count > MOST_SLOTS:
        return f"{count} slots are more than the {MOST_SLOTS} that a program can put in order"
    if fits(count, width, LARGEST):
        return None
    return f"a memory of {count} x {width} is larger than the {LARGEST} numbers that fit a program's registers"


def check(
    slots: Slots,
    fresh: Slots,
    reads: Reads | None,
    writes: Writes | None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> None:
    """Raises KernelError if shapes, dtypes or devices do not fit together.

    B rows, T tokens, N slots of width W, R heads that read.
    """
    values: dict[str, tuple[Tensor | None, str]] = {}
    for name, group, shapes in (
        ("slots", slots, SHAPES), ("fresh", fresh, SHAPES), ("reads", reads, READS), ("writes", writes, WRITES),
    ):  # fmt: skip
        if group is not None:
            values |= {f"{name}.{field}": (getattr(group, field), letters) for field, letters in shapes.items()}
    flags: dict[str, tuple[Tensor | None, str]] = {"mask": (mask, "B T"), "reset": (reset, "B T")}
    sizes = {"one": 1, "three": 3}
    if slots.memory.dim() == 3:
        sizes["M"] = slots.memory.shape[1]
    check_shapes("dnc", sizes, **values, **flags)
    check_floats("dnc", **{name: tensor for name, (tensor, _) in values.items()})
    for name, (flag, _) in flags.items():
        if flag is not None and flag.dtype != torch.bool:
            raise KernelError(f"op 'dnc': {name} has dtype {flag.dtype}", hint="pass bool")
