"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn


def examples() -> Iterator[Example]:
    """Ragged lengths and sizes, with and without states, resets, packing and the skip."""
    yield example(2, 33, 4, 7, 2, 5, state=True, skip=True)
    yield example(1, 130, 2, 24, 1, 16)
    yield example(1, 67, 3, 40, 3, 20, reset=True, skip=True)
    yield example(2, 1, 4, 18, 2, 6, state=True, skip=True)
    yield example(2, 1, 2, 8, 1, 8, reset=True)
    yield example(2, 0, 2, 4, 1, 4, state=True, skip=True)
    yield example(1, 90, 2, 11, 1, 9, state=True, reset=True, skip=True, cuts=[0, 17, 17, 18, 90])


def example(
    B: int, T: int, H: int, P: int, G: int, N: int, *,
    state: bool = False, reset: bool = False, skip: bool = False, cuts: list[int] | None = None,
) -> Example:  # fmt: skip
    """One call; a tenth of the step sizes is exactly 0. cuts: cu_seqlens."""
    dt = F.softplus(randn(B, T, H, seed=1, grad=False) * 3)
    dt = dt.masked_fill(randn(B, T, 1, seed=2, grad=False) < -1.3, 0)
    arguments: dict[str, Any] = {
        "x": randn(B, T, H, P, seed=3), "dt": dt.requires_grad_(),
        "A": (-randn(H, seed=4, grad=False).exp()).requires_grad_(),
        "B": randn(B, T, G, N, seed=5), "C": randn(B, T, G, N, seed=6), "D": randn(H, seed=7) if skip else None,
        "initial_state": randn(B if cuts is None else len(cuts) - 1, H, N, P, seed=8) if state else None,
        "reset": randn(B, T, seed=9, grad=False) > 1 if reset else None,
        "cu_seqlens": None if cuts is None else torch.tensor(cuts),
    }  # fmt: skip
    named = {"state": state, "reset": reset, "D": skip, "packed": cuts is not None}
    label = f"B={B} T={T} H={H} P={P} G={G} N={N}"
    return Example(" ".join([label, *(name for name, there in named.items() if there)]), arguments)


def workloads() -> Iterator[Workload]:
    """The layer of mamba2-130m on a CPU, as a whole sequence and as one step; that of mamba2-1.3b on a GPU."""
    yield workload("cpu", 1, 1024, 24)
    yield workload("cpu", 1, 1, 24)
    for batch, length in [(1, 2048), (8, 4096), (1, 32768), (64, 1)]:
        yield workload("cuda", batch, length, 64)


def workload(device: str, B: int, T: int, H: int, *, P: int = 64, G: int = 1, N: int = 128) -> Workload:
    """One call, from a given state."""
    shapes = {"x": (B, T, H, P), "B": (B, T, G, N), "C": (B, T, G, N)}

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        made = {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}
        made |= {"dt": F.softplus(normal(B, T, H) - 3), "A": -normal(H).exp(), "D": normal(H)}
        made["initial_state"] = normal(B, H, N, P)
        return {name: value.requires_grad_() for name, value in made.items()}

    def traffic(dtype: torch.dtype) -> float:
        numbers = B * T * (2 * H * P + 2 * G * N)
        return numbers * dtype.itemsize + (B * T * H + 2 * B * H * N * P) * 4

    # B v^T + h: two operations, C h: two, the decay of h: one.
    flops = 5.0 * B * T * H * N * P
    return Workload(f"B={B} T={T} H={H} P={P} G={G} N={N}", arguments, traffic, flops, device)
