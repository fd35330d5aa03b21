"""What the NTM's time loop may be called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altx_kernels import KernelError
from altx_kernels.arguments import check_floats, check_shapes
from altx_ntm.kernels.ntm.reference import Heads, Slots, Writes
from altx_ntm.kernels.sizes import fits

LARGEST = 1 << 13
"""Numbers in a memory, both sides rounded up to powers of two, for which a GPU's program has registers."""


def too_large(slots: Slots, *_: Any, **__: Any) -> str | None:
    """Why the memory does not fit the registers of one program, which holds it whole, or None."""
    count, width = slots.memory.shape[1:]
    if fits(count, width, LARGEST):
        return None
    return f"a memory of {count} x {width} is larger than the {LARGEST} numbers that fit a program's registers"


def check(
    slots: Slots,
    fresh: Slots,
    reads: Heads | None,
    writes: Writes | None,
    *,
    write_first: bool = False,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> None:
    """Raises KernelError if shapes, dtypes or devices do not fit together.

    B rows, T tokens, N slots of width W, R heads that read and H that write, S shifts.
    """
    values: dict[str, tuple[Tensor | None, str]] = {}
    for name, one in (("slots", slots), ("fresh", fresh)):
        values[f"{name}.memory"] = (one.memory, "B N W")
        values[f"{name}.read_address"] = (one.read_address, "B R N")
        values[f"{name}.write_address"] = (one.write_address, "B H N")
    for name, heads, letter in (("reads", reads, "R"), ("writes.heads", writes and writes.heads, "H")):
        if heads is not None:
            values[f"{name}.key"] = (heads.key, f"B T {letter} W")
            values[f"{name}.shift"] = (heads.shift, f"B T {letter} S")
            for field in ("strength", "gate", "sharpness"):
                values[f"{name}.{field}"] = (getattr(heads, field), f"B T {letter} one")
    if writes is not None:
        values["writes.erase"] = (writes.erase, "B T H W")
        values["writes.add"] = (writes.add, "B T H W")
    sizes = {"one": 1}
    flags: dict[str, tuple[Tensor | None, str]] = {"mask": (mask, "B T"), "reset": (reset, "B T")}
    check_shapes("ntm", sizes, **values, **flags)
    check_floats("ntm", **{name: tensor for name, (tensor, _) in values.items()})
    shifts = sizes.get("S", 1)
    if shifts % 2 == 0 or shifts > max(sizes["N"], 1):
        raise KernelError(
            f"op 'ntm': {shifts} shifts for {sizes['N']} slots", hint="there are 2r + 1, as many as slots at the most"
        )
    for name, (flag, _) in flags.items():
        if flag is not None and flag.dtype != torch.bool:
            raise KernelError(f"op 'ntm': {name} has dtype {flag.dtype}", hint="pass bool")
