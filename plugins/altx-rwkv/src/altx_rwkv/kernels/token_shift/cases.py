"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from altx_kernels.examples import Example, Workload, randn


def examples() -> Iterator[Example]:
    """Ragged lengths and sizes; every option alone and together."""
    yield example(2, 33, 5, 3)
    yield example(2, 19, 7, 2, "state")
    yield example(2, 19, 7, 1, "reset")
    yield example(3, 40, 37, 6, "state", "reset")
    yield example(2, 1, 16, 3, "state", "reset")
    yield example(1, 300, 257, 2, "state")
    yield example(2, 0, 5, 3, "state")
    yield example(0, 4, 5, 3, "state")


def example(B: int, T: int, D: int, N: int, *options: str) -> Example:
    arguments: dict[str, Any] = {
        "x": randn(B, T, D, seed=1), "mix": randn(N, D, seed=2),
        "initial_state": randn(B, D, seed=3) if "state" in options else None,
        "reset": randn(B, T, seed=4, grad=False) > 1 if "reset" in options else None,
    }  # fmt: skip
    return Example(" ".join([f"B={B} T={T} D={D} N={N}", *options]), arguments)


def workloads() -> Iterator[Workload]:
    """Of a layer of RWKV-4 with 169 million parameters on a CPU, of RWKV-7 with 2.9 billion on a GPU."""
    for batch, length in [(1, 1024), (8, 1024), (1, 1)]:
        yield workload("cpu", batch, length, 768, 3)
    for batch, length in [(1, 2048), (4, 8192)]:
        yield workload("cuda", batch, length, 2560, 6)


def workload(device: str, B: int, T: int, D: int, N: int) -> Workload:
    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(B, T, D, device=device, dtype=dtype, generator=generator)
        mix = torch.rand(N, D, device=device, dtype=dtype, generator=generator)
        return {"x": x.requires_grad_(), "mix": mix.requires_grad_()}

    def traffic(dtype: torch.dtype) -> float:
        return float((B * T * D * (N + 1) + N * D) * dtype.itemsize)

    return Workload(f"B={B} T={T} D={D} N={N}", arguments, traffic, B * T * D * (1.0 + 2 * N), device)
