"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from altx_kernels.examples import Example, Workload, randn


def examples() -> Iterator[Example]:
    """Whole heads and parts of them, both kinds of planes, positions of one row and of each."""
    for interleave in (False, True):
        yield example(2, 33, 4, 8, 4, interleave=interleave)
        yield example(2, 5, 3, 37, 17, interleave=interleave)
        yield example(3, 7, 2, 23, 5, first=4, rows=3, interleave=interleave)
        yield example(2, 1, 1, 64, 32, rows=2, interleave=interleave)
        yield example(2, 0, 3, 6, 3, interleave=interleave)


def example(
    B: int, T: int, H: int, D: int, E: int, *, rows: int = 1, first: int = 0, interleave: bool = False
) -> Example:
    """One call; angles are `rows` rows of them."""
    angle = randn(rows, T, E, seed=1, grad=False) * 3
    arguments = {
        "x": randn(B, T, H, D), "cos": angle.cos(), "sin": angle.sin(), "first": first, "interleave": interleave
    }  # fmt: skip
    return Example(f"B={B} T={T} H={H} D={D} E={E} rows={rows} first={first} interleave={interleave}", arguments)


def workloads() -> Iterator[Workload]:
    """Width 768 on a CPU; an 8B model's queries on a GPU."""
    yield workload("cpu", 1, 1024, 12, 64)
    yield workload("cpu", 4, 1024, 4, 192)
    yield workload("cuda", 4, 8192, 32, 128)


def workload(device: str, B: int, T: int, H: int, D: int) -> Workload:
    """One call that turns whole heads."""

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(B, T, H, D, device=device, dtype=dtype, generator=generator, requires_grad=True)
        angle = torch.randn(1, T, D // 2, device=device, generator=generator)
        return {"x": x, "cos": angle.cos(), "sin": angle.sin()}

    return Workload(
        f"B={B} T={T} H={H} D={D}", arguments, lambda dtype: 2.0 * B * T * H * D * dtype.itemsize, 3.0 * B * T * H * D,
        device,
    )  # fmt: skip
