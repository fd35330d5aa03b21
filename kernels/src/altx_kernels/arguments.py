"""Checks of what an op is called with: what is wrong, in words, before any kernel sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.op import KernelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shapes(op: str, sizes: dict[str, int], **arguments: tuple[Tensor | None, str]) -> None:
    """Check tensors against shapes in letters, such as `x=(x, "B T D")`.

    A letter stands for the size that its first tensor has; `sizes` gives those known before and receives the
    others. "K-1" is one less than K. All tensors must be on one device.

    Raises:
        KernelError: naming the op, the argument, its shape and the one expected.
    """
    device = None
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        names = letters.split()
        shape = tuple(tensor.shape)
        wrong = len(shape) != len(names)
        for letter, size in zip(names, shape, strict=False):
            letter, _, less = letter.partition("-")
            if sizes.setdefault(letter, size + int(less or 0)) != size + int(less or 0):
                wrong = True
        if wrong:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in letters)
            raise KernelError(
                f"op {op!r}: {name} has shape {shape}, not ({', '.join(names)})" + (f" with {known}" if known else ""),
                hint=f"pass {name} with {len(names)} dimensions that agree with the other arguments",
            )
        device = device or tensor.device
        if tensor.device != device:
            raise KernelError(
                f"op {op!r}: {name} is on {tensor.device}, the other arguments on {device}",
                hint="move all arguments to one device",
            )


def check_floats(op: str, **arguments: Tensor | None) -> None:
    """Raises KernelError for an argument that is not of a floating dtype."""
    for name, tensor in arguments.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise KernelError(
                f"op {op!r}: {name} has dtype {tensor.dtype}",
                hint="pass bfloat16, float16, float32 or float64",
            )


def precise(*tensors: Tensor | None) -> torch.dtype:
    """What an op computes in: float64 if any of its arguments is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
