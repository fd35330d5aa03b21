"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from altx_kernels.examples import Example, Workload, randn


def examples() -> Iterator[Example]:
    """Empty targets, one, very uneven ones, void rows; widths that are no multiple of anything."""
    for offsets in ([0, 3, 3, 8, 9], [0, 0, 70, 71, 71], [0, 0, 0], [0, 40], [0, 17, 33, 50, 68, 85, 90]):
        for width, hidden in ((5, 3), (33, 40), (1, 1)):
            yield example(offsets, width, hidden, void=0)
        yield example(offsets, 8, 24, void=3)
        yield example(offsets, 19, 6, void=3, outer=True)


def example(offsets: list[int], D: int, F: int, *, void: int, outer: bool = False) -> Example:
    """One call; void rows hold NaN."""
    P, n = offsets[-1] + void, len(offsets) - 1
    x, other = randn(P, D), randn(P, F, seed=1) if outer else randn(n, D, F, seed=1)
    for each in (x, other)[: 1 + outer]:
        each.data[offsets[-1] :] = torch.nan
    kind = "outer " if outer else ""
    label = f"{kind}offsets={offsets} D={D} F={F} void={void}"
    return Example(label, {"x": x, "other": other, "offsets": torch.tensor(offsets)})


def workloads() -> Iterator[Workload]:
    """A layer of width 768 with 8 experts on a CPU; one of an 8x7B model on a GPU, and small experts of a large one."""
    yield workload("cpu", 2048, 8, 768, 2048)
    yield workload("cuda", 16384, 8, 4096, 14336)
    yield workload("cuda", 65536, 64, 2048, 1408)


def workload(device: str, P: int, n: int, D: int, F: int) -> Workload:
    """One product, of which some targets get twice as many rows as others."""

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)
        made = [
            torch.randn(*shape, device=device, dtype=dtype, generator=generator, requires_grad=True)
            for shape in ((P, D), (n, D, F))
        ]
        shares = torch.linspace(1, 2, n).cumsum(0)
        offsets = torch.cat([torch.zeros(1), P * shares / shares[-1]]).round().long()
        assert all(start < stop for start, stop in pairwise(offsets.tolist()))
        return {"x": made[0], "other": made[1], "offsets": offsets.to(device)}

    numbers = P * (D + F) + n * D * F
    return Workload(
        f"P={P} n={n} D={D} F={F}", arguments, lambda dtype: float(numbers * dtype.itemsize), 2.0 * P * D * F, device
    )
