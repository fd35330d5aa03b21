"""Calls of `mamba-step` to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn


def arguments(rows: int, width: int, inner: int, size: int, taps: int, rank: int, bias: bool = True) -> dict[str, Any]:
    """Arguments of `mamba_step` in float64."""

    def scaled(scale: float, *shape: int, seed: int) -> Tensor:
        return (scale * randn(*shape, seed=seed)).detach().requires_grad_()

    def matrix(out: int, into: int, seed: int) -> Tensor:
        return scaled(into**-0.5, out, into, seed=seed)

    return {
        "x": randn(rows, 1, width, seed=1),
        "past": randn(rows, taps - 1, inner, seed=2),
        "h": randn(rows, inner, size, seed=3),
        "in_weight": matrix(2 * inner, width, 11),
        "in_bias": None if bias else randn(2 * inner, seed=12),
        "conv_weight": randn(inner, 1, taps, seed=4),
        "conv_bias": randn(inner, seed=5) if bias else None,
        "x_weight": matrix(rank + 2 * size, inner, 6),
        "dt_weight": matrix(inner, rank, 7),
        "dt_bias": scaled(0.3, inner, seed=8),
        "A_log": scaled(0.3, inner, size, seed=9),
        "D": randn(inner, seed=10),
        "out_weight": matrix(width, inner, 13),
        "out_bias": None if bias else randn(width, seed=14),
        "pre_weight": None if bias else randn(width, seed=15),
        "pre_eps": 1e-5,
    }


def examples() -> Iterator[Example]:
    for sizes in ((1, 3, 5, 3, 4, 2), (3, 21, 40, 16, 4, 5), (2, 16, 33, 17, 1, 3), (0, 4, 8, 4, 2, 1)):
        label = "B={} M={} E={} N={} K={} R={}".format(*sizes)
        yield Example(label, arguments(*sizes))
        yield Example(f"{label} norms", {**arguments(*sizes, bias=False), "inner_norm_eps": 1e-6})


def workloads() -> Iterator[Workload]:
    for sizes in ((1, 768, 1536, 16, 4, 48), (8, 768, 1536, 16, 4, 48)):
        rows, width, inner, size, taps, rank = sizes

        def make(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = sizes) -> dict[str, Any]:
            return {
                name: value.detach().to(device, dtype) if isinstance(value, Tensor) else value
                for name, value in arguments(*sizes).items()  # type: ignore[arg-type]
            }

        weights = inner * (3 * width + taps + 2 * rank + 3 * size + 3)
        numbers = weights + rows * (2 * width + 2 * inner * (taps - 1 + size))
        yield Workload(
            "B={} M={} E={} N={} K={} R={}".format(*sizes),
            make,
            bytes=lambda dtype, numbers=numbers: numbers * dtype.itemsize,  # type: ignore[misc]
            flops=2.0 * rows * inner * (3 * width + taps + 2 * rank + 4 * size),
            device="cpu",
        )
