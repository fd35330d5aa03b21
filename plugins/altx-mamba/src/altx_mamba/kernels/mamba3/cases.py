"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn


def examples() -> Iterator[Example]:
    """Ragged lengths and sizes, with and without states, resets, padding, packing and the skip."""
    yield example(2, 33, 4, 7, 2, 6, 2, state=True, skip=True)
    yield example(1, 130, 2, 24, 1, 16, 8)
    yield example(1, 67, 3, 40, 3, 20, 5, reset=True, skip=True)
    yield example(2, 41, 2, 8, 1, 10, 3, state=True, reset=True)
    yield example(3, 20, 2, 5, 1, 8, 2, state=True, reset=True, lengths=[20, 0, 7])
    yield example(2, 1, 4, 18, 2, 6, 1, state=True, skip=True)
    yield example(2, 1, 2, 8, 1, 8, 4, reset=True, state=True)
    yield example(2, 1, 2, 8, 1, 8, 4, state=True, lengths=[1, 0])
    yield example(2, 0, 2, 4, 1, 4, 2, state=True, skip=True)
    yield example(1, 90, 2, 11, 1, 10, 2, state=True, reset=True, skip=True, cuts=[0, 0, 17, 17, 18, 90, 90])
    yield example(1, 30, 2, 5, 2, 4, 1, cuts=[0, 13, 30])


def example(
    B: int, T: int, H: int, P: int, G: int, N: int, R: int, *, state: bool = False, reset: bool = False,
    skip: bool = False, lengths: list[int] | None = None, cuts: list[int] | None = None,
) -> Example:  # fmt: skip
    """One call; a tenth of the step sizes is exactly 0. cuts: cu_seqlens."""
    dt = F.softplus(randn(B, T, H, seed=1, grad=False) * 3)
    dt = dt.masked_fill(randn(B, T, 1, seed=2, grad=False) < -1.3, 0)
    rows = B if cuts is None else len(cuts) - 1
    arguments: dict[str, Any] = {
        "x": randn(B, T, H, P, seed=3), "dt": dt.requires_grad_(),
        "A": (-randn(B, T, H, seed=4, grad=False).exp()).requires_grad_(),
        "B": randn(B, T, G, N, seed=5), "C": randn(B, T, G, N, seed=6),
        "trap": randn(B, T, H, seed=7), "angles": randn(B, T, R, seed=8),
        "B_bias": randn(H, N, seed=9), "C_bias": randn(H, N, seed=10), "D": randn(H, seed=11) if skip else None,
        "initial_state": randn(rows, H, N, P, seed=12) if state else None,
        "initial_angle": randn(rows, H, R, seed=13) if state else None,
        "initial_k": randn(rows, H, N, seed=14) if state else None,
        "initial_v": randn(rows, H, P, seed=15) if state else None,
        "reset": randn(B, T, seed=16, grad=False) > 1 if reset else None,
        "lengths": None if lengths is None else torch.tensor(lengths),
        "cu_seqlens": None if cuts is None else torch.tensor(cuts),
    }  # fmt: skip
    named = {
        "state": state, "reset": reset, "D": skip, "padded": lengths is not None, "packed": cuts is not None
    }  # fmt: skip
    label = f"B={B} T={T} H={H} P={P} G={G} N={N} R={R}"
    return Example(" ".join([label, *(name for name, there in named.items() if there)]), arguments)


def workloads() -> Iterator[Workload]:
    """A layer of width 768 on a CPU, as a whole sequence and as one step; one of width 2048 on a GPU."""
    yield workload("cpu", 1, 1024, 24)
    yield workload("cpu", 1, 1, 24)
    for batch, length in [(1, 2048), (4, 4096), (1, 32768), (64, 1)]:
        yield workload("cuda", batch, length, 64)


def workload(device: str, B: int, T: int, H: int, *, P: int = 64, G: int = 1, N: int = 128, R: int = 32) -> Workload:
    """One call, from given states."""

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        made = {
            "x": normal(B, T, H, P, dtype=dtype), "dt": F.softplus(normal(B, T, H) - 3), "A": -normal(B, T, H).exp(),
            "B": normal(B, T, G, N, dtype=dtype), "C": normal(B, T, G, N, dtype=dtype),
            "trap": normal(B, T, H, dtype=dtype), "angles": normal(B, T, R, dtype=dtype),
            "B_bias": normal(H, N), "C_bias": normal(H, N), "D": normal(H),
            "initial_state": normal(B, H, N, P), "initial_angle": normal(B, H, R),
            "initial_k": normal(B, H, N), "initial_v": normal(B, H, P),
        }  # fmt: skip
        return {name: value.requires_grad_() for name, value in made.items()}

    def traffic(dtype: torch.dtype) -> float:
        numbers = B * T * (2 * H * P + 2 * G * N + H + R)
        return numbers * dtype.itemsize + (2 * B * T * H + 2 * B * H * (N * P + N + P + R)) * 4

    # As for SSD, and a turn of each pair of q and k: three operations per number, and one more to scale k.
    flops = B * T * H * (5.0 * N * P + 8 * N)
    return Workload(f"B={B} T={T} H={H} P={P} G={G} N={N} R={R}", arguments, traffic, flops, device)
