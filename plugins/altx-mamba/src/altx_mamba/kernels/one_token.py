"""What the native backends of ops that compute one token have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from altx_kernels import KernelError

Shape = tuple[int, ...]

ALONE = 1 << 16
"""Weights below which a second thread costs more than it brings."""

ROWS = 8
"""Rows above which a library's matrix products are faster than one matrix-vector product each."""


def unavailable(x: Tensor, *others: Tensor | None, **named: object) -> str | None:
    """Why native code cannot compute one token x (B, M), or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, and native code runs on the CPU"
    if x.shape[0] > ROWS:
        return f"{x.shape[0]} rows: it is meant for {ROWS} at the most"
    grad, dtype = torch.is_grad_enabled(), x.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return f"x is {dtype}: it takes float32 and float64"
    for tensor in (x, *others, *named.values()):
        if isinstance(tensor, Tensor):
            if not tensor.is_cpu:
                return f"an argument is on {tensor.device}, x on the CPU"
            if tensor.dtype is not dtype:
                return f"an argument is {tensor.dtype} where x is {dtype}"
            if grad and tensor.requires_grad:
                return "gradients are wanted, and it has none"
    return None


def check(op: str, matrices: dict[str, Tensor], shapes: Callable[[], dict[str, tuple[Tensor | None, Shape]]]) -> None:
    """Look at the shapes of a call, in a few microseconds: a step of decoding is short.

    Args:
        op: name of the op.
        matrices: what has two axes, from which the others' shapes follow.
        shapes: makes the arguments and the shape that each should have, by name; None is left out.

    Raises:
        KernelError: naming the argument that does not fit.
    """
    for name, matrix in matrices.items():
        if matrix.dim() != 2:
            raise KernelError(f"op {op!r}: {name} has shape {tuple(matrix.shape)}", hint="it has two dimensions")
    for name, (tensor, shape) in shapes().items():
        if tensor is not None and tensor.shape != shape:
            raise KernelError(
                f"op {op!r}: {name} has shape {tuple(tensor.shape)}, not {shape}",
                hint="a state comes from a layer of the same sizes, and for as many rows",
            )


def writable(state: Tensor, donate: bool) -> Tensor:
    """The state itself, contiguous, if it was given up, else a copy."""
    if donate and state.is_contiguous():
        return state
    return state.clone(memory_format=torch.contiguous_format)
