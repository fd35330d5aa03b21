"""Starting Triton kernels: which tokens each program gets, in what blocks, without tuning at call time."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu import INTERPRETED

# torch.library's name of the devices that the kernels are registered for.
DEVICE = "CPU" if INTERPRETED else "CUDA"

# Receives every launch instead of the GPU, while it is set; see altx_kernels.gpu.compiling.
recorder: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first tensor.

    Args:
        grid: number of programs; nothing happens if there are none.
        args: tensors, None and numbers.
        options: constants of the kernel, and num_warps.
    """
    if not all(grid):
        return
    if recorder is not None:
        recorder(kernel, args, options)
        return
    tensor = next(a for a in args if isinstance(a, Tensor))
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`; tl.dot takes no side under 16."""
    return max(least, 1 << max(n - 1, 0).bit_length())


@cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors; the interpreter counts as a large GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; the interpreter's is as good as any."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def segment(x: Tensor, tokens: int, programs: int, chunk: int) -> int | None:
    """How many tokens a program walks through: None, all of its sequence, where that occupies the GPU.

    Splitting reads the inputs twice, so it must bring at least three segments.

    Args:
        x: a tensor on the device.
        tokens: of a sequence, or of all packed sequences together.
        programs: how many there are without splitting.
        chunk: what the length is a multiple of.
    """
    wanted = 4 * processors(x.device) // max(programs, 1)
    length = triton.cdiv(triton.cdiv(tokens, max(wanted, 1)), chunk) * chunk
    return length if wanted >= 3 and tokens > 2 * length else None


@dataclass(frozen=True)
class Pieces:
    """Sequences cut into pieces of equal length, the last of each being what is left.

    Args:
        count: number of pieces; for packed sequences an upper bound, so that no value is waited for.
        sequences: number of sequences.
        tokens: of a row.
        length: of a piece.
        table: (count, 3) int64, the sequence, first token and end of each; None where the rows are the sequences.
        firsts: (N+1,) int64, the first piece of each sequence; None likewise.
    """

    count: int
    sequences: int
    tokens: int
    length: int
    table: Tensor | None = None
    firsts: Tensor | None = None


def cut(x: Tensor, cu_seqlens: Tensor | None, length: int | None) -> Pieces:
    """The pieces of the sequences in x (B, T, ...); with length None each sequence is one."""
    rows, tokens = x.shape[:2]
    if cu_seqlens is None:
        length = length or tokens
        return Pieces(rows * triton.cdiv(tokens, length), rows, tokens, length)
    cu = cu_seqlens.to(x.device, torch.int64)
    number = len(cu) - 1
    every = torch.arange(number + 1, device=x.device)
    if length is None:
        return Pieces(number, number, tokens, tokens, torch.stack([every[:-1], cu[:-1], cu[1:]], 1), every)
    counts = (cu.diff() + length - 1) // length
    firsts = torch.cat([every[:1], counts.cumsum(0)])
    pieces = torch.arange(triton.cdiv(tokens, length) + number, device=x.device)
    n = torch.searchsorted(firsts[1:], pieces, right=True).clamp(max=number - 1)
    stop = torch.minimum(cu[n] + (pieces - firsts[n] + 1) * length, cu[n + 1])
    start = torch.minimum(cu[n] + (pieces - firsts[n]) * length, stop)
    return Pieces(len(pieces), number, tokens, length, torch.stack([n, start, stop], 1), firsts)


def rows(x: Tensor) -> Tensor:
    """x (B, T, ...) so that token t of row b lies at (b T + t) * x.stride(1), and channels side by side."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even and x.stride(-1) == 1 else x.contiguous()


def dot_types(dtype: torch.dtype) -> dict[str, Any]:
    """In what matrix products are computed, as constants DT and PREC of a kernel.

    float32 is split in three, for TF32 alone keeps 3 digits. float16 goes through TF32, which has its digits and the
    range that sums need. The interpreter multiplies bfloat16 wrongly, without a word.
    """
    if dtype == torch.bfloat16 and not INTERPRETED:
        return {"DT": tl.bfloat16, "PREC": "tf32"}
    return {"DT": tl.float32, "PREC": "ieee" if INTERPRETED else "tf32" if dtype == torch.float16 else "tf32x3"}
