"""What the native backends of ops that compute one token have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_kernels import KernelError

ALONE = 1 << 16
"""Weights below which a second thread costs more than it brings."""

ROWS = 8
"""Rows above which a library's matrix products are faster than one matrix-vector product each."""


def unavailable(x: Tensor, *others: Tensor | None, **named: object) -> str | None:
    """Why native code cannot compute one token x (B, 1, M), or None."""
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
            if tensor.dtype is not dtype and tensor.dtype is not torch.int64:
                return f"an argument is {tensor.dtype} where x is {dtype}"
            if grad and tensor.requires_grad:
                return "gradients are wanted, and it has none"
    return None


def check(op: str, names: Sequence[str], *pairs: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Look at the shapes of a call, in a few microseconds: a step of decoding is short.

    Args:
        op: name of the op.
        names: of the arguments.
        pairs: each argument, None where it was left out, and the shape that it should have.

    Raises:
        KernelError: naming the first argument that does not fit.
    """
    for index, (tensor, shape) in enumerate(pairs):
        if tensor is not None and tensor.shape != shape:
            raise KernelError(
                f"op {op!r}: {names[index]} has shape {tuple(tensor.shape)}, not {shape}",
                hint="a state comes from a layer of the same sizes, and for as many rows",
            )


def check_counts(op: str, seen: Tensor | None) -> None:
    """Raises KernelError if `seen` is not what native code may write integers to."""
    if seen is not None and (seen.dtype is not torch.int64 or not seen.is_contiguous()):
        raise KernelError(f"op {op!r}: seen is {seen.dtype}", hint="pass contiguous int64: it is written to")


def wrong_axes(op: str, **arguments: tuple[Tensor, int]) -> KernelError:
    """What to raise where an argument has not as many dimensions as it should."""
    found = ", ".join(f"{name} has {tensor.dim()} of {count}" for name, (tensor, count) in arguments.items())
    return KernelError(
        f"op {op!r}: wrong number of dimensions: {found}", hint="a token of each row is (rows, 1, width)"
    )


def writable(state: Tensor, donate: bool) -> Tensor:
    """The state itself, contiguous, if it was given up, else a copy."""
    if donate and state.is_contiguous():
        return state
    return state.clone(memory_format=torch.contiguous_format)


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What the reference gives the mixer of x (B, M), in the dtype that it computes in: its RMSNorm if it has one."""
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def added(y: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """What the reference returns of y (B, M) for the token x (B, 1, M): with x added to it if x was normed."""
    return (y[:, None] if weight is None else x + y[:, None]).to(x.dtype)
