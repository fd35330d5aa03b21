"""Calls of `mamba3-step` to verify and to time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn


class Sizes(NamedTuple):
    rows: int
    width: int
    heads: int
    head_dim: int
    groups: int
    size: int
    angles: int

    def __str__(self) -> str:
        return "B={} M={} H={} P={} G={} N={} R={}".format(*self)


def arguments(sizes: Sizes, norm: bool = False) -> dict[str, Any]:
    """Arguments of `mamba3_step` in float64."""
    rows, width, heads, head_dim, groups, size, angles = sizes
    inner = heads * head_dim
    projected = 2 * inner + 2 * groups * size + 3 * heads + angles

    def scaled(scale: float, *shape: int, seed: int) -> Tensor:
        return (scale * randn(*shape, seed=seed)).detach().requires_grad_()

    return {
        "x": randn(rows, 1, width, seed=1),
        "h": randn(rows, heads, size, head_dim, seed=2),
        "angle": (math.pi + scaled(0.5, rows, heads, angles, seed=3)).detach().requires_grad_(),
        "k": randn(rows, heads, size, seed=4),
        "v": randn(rows, heads, head_dim, seed=5),
        "in_weight": scaled(width**-0.5, projected, width, seed=6),
        "dt_bias": scaled(0.3, heads, seed=7),
        "B_weight": randn(size, seed=8),
        "C_weight": randn(size, seed=9),
        "B_bias": randn(heads, size, seed=10),
        "C_bias": randn(heads, size, seed=11),
        "D": randn(heads, seed=12),
        "norm_weight": randn(inner, seed=13) if norm else None,
        "out_weight": scaled(inner**-0.5, width, inner, seed=14),
        "norm_eps": 1e-5,
        "A_floor": 1e-4,
        "pre_weight": randn(width, seed=15) if norm else None,
        "pre_eps": 1e-5,
    }


def examples() -> Iterator[Example]:
    for sizes in (
        Sizes(1, 3, 1, 5, 1, 4, 1),
        Sizes(3, 21, 4, 9, 2, 7, 3),
        Sizes(2, 16, 6, 64, 3, 16, 8),
        Sizes(2, 19, 3, 83, 1, 40, 10),
        Sizes(0, 4, 2, 4, 1, 4, 1),
    ):
        yield Example(str(sizes), arguments(sizes))
        other = {**arguments(sizes, norm=True), "heavy_tail": True, "A_floor": 0.9}
        yield Example(f"{sizes} norms heavy-tail", other)


def workloads() -> Iterator[Workload]:
    for rows in (1, 8):
        sizes = Sizes(rows, 768, 24, 64, 1, 128, 32)

        def make(device: torch.device, dtype: torch.dtype, sizes: Sizes = sizes) -> dict[str, Any]:
            return {
                name: value.detach().to(device, dtype) if isinstance(value, Tensor) else value
                for name, value in arguments(sizes).items()
            }

        counted = {name: value.numel() for name, value in arguments(sizes).items() if isinstance(value, Tensor)}
        numbers = sum(counted.values()) + sum(counted[name] for name in ("x", "h", "angle", "k", "v"))
        yield Workload(
            str(sizes),
            make,
            bytes=lambda dtype, numbers=numbers: numbers * dtype.itemsize,  # type: ignore[misc]
            flops=2.0 * rows * (counted["in_weight"] + counted["out_weight"]) + 7.0 * counted["h"],
            device="cpu",
        )
