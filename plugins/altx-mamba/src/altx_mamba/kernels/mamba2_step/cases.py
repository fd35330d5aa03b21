"""Calls of `mamba2-step` to verify and to time."""

from __future__ import annotations

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
    taps: int

    def __str__(self) -> str:
        return "B={} M={} H={} P={} G={} N={} K={}".format(*self)


def arguments(sizes: Sizes, bias: bool = False) -> dict[str, Any]:
    """Arguments of `mamba2_step` in float64."""
    rows, width, heads, head_dim, groups, size, taps = sizes
    inner = heads * head_dim
    channels = inner + 2 * groups * size

    def scaled(scale: float, *shape: int, seed: int) -> Tensor:
        return (scale * randn(*shape, seed=seed)).detach().requires_grad_()

    return {
        "x": randn(rows, 1, width, seed=1),
        "past": randn(rows, taps - 1, channels, seed=2),
        "h": randn(rows, heads, size, head_dim, seed=3),
        "in_weight": scaled(width**-0.5, inner + channels + heads, width, seed=4),
        "in_bias": randn(inner + channels + heads, seed=5) if bias else None,
        "conv_weight": randn(channels, 1, taps, seed=6),
        "conv_bias": None if bias else randn(channels, seed=7),
        "dt_bias": randn(heads, seed=8),
        "A_log": scaled(0.3, heads, seed=9),
        "D": randn(heads, seed=10),
        "norm_weight": randn(inner, seed=11),
        "out_weight": scaled(inner**-0.5, width, inner, seed=12),
        "out_bias": randn(width, seed=13) if bias else None,
        "norm_eps": 1e-5,
        "pre_weight": randn(width, seed=14) if bias else None,
        "pre_eps": 1e-5,
    }


def examples() -> Iterator[Example]:
    for sizes in (
        Sizes(1, 3, 1, 5, 1, 4, 2),
        Sizes(3, 21, 4, 9, 2, 7, 4),
        Sizes(2, 16, 6, 64, 3, 16, 1),
        Sizes(2, 19, 3, 83, 1, 5, 3),
        Sizes(0, 4, 2, 4, 1, 4, 3),
    ):
        yield Example(str(sizes), arguments(sizes))
        yield Example(f"{sizes} biases limits norm", {**arguments(sizes, bias=True), "dt_limit": (0.5, 1.0)})


def workloads() -> Iterator[Workload]:
    for rows in (1, 8):
        sizes = Sizes(rows, 768, 24, 64, 1, 128, 4)

        def make(device: torch.device, dtype: torch.dtype, sizes: Sizes = sizes) -> dict[str, Any]:
            return {
                name: value.detach().to(device, dtype) if isinstance(value, Tensor) else value
                for name, value in arguments(sizes).items()
            }

        counted = {name: value.numel() for name, value in arguments(sizes).items() if isinstance(value, Tensor)}
        numbers = sum(counted.values()) + sum(counted[name] for name in ("x", "past", "h"))
        products = counted["in_weight"] + counted["conv_weight"] + counted["out_weight"]
        yield Workload(
            str(sizes),
            make,
            bytes=lambda dtype, numbers=numbers: numbers * dtype.itemsize,  # type: ignore[misc]
            flops=2.0 * rows * products + 5.0 * counted["h"],
            device="cpu",
        )
