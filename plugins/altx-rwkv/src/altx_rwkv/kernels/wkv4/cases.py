"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn

OPTIONS = ("state", "reset", "lengths")


def examples() -> Iterator[Example]:
    """Ragged lengths and sizes; every option alone, all together, and packed batches."""
    yield example(2, 33, 5)
    for option in OPTIONS:
        yield example(2, 19, 7, option)
    yield example(3, 40, 37, *OPTIONS)
    yield example(2, 1, 16, "state", "lengths")
    yield example(2, 1, 6)
    yield example(2, 0, 5, "state")
    yield example(0, 4, 5, "state")
    yield example(1, 50, 20, cuts=[0, 17, 17, 18, 50])
    yield example(1, 60, 18, "state", "reset", cuts=[0, 0, 33, 34, 50, 60, 60])


def example(B: int, T: int, D: int, *options: str, cuts: list[int] | None = None) -> Example:
    """One call with those of OPTIONS that are named. Some keys are large, some decays strong. cuts: cu_seqlens."""
    k = randn(B, T, D, seed=1, grad=False) * 3
    k = torch.where(randn(B, T, D, seed=2, grad=False) > 2, 20 * k, k)
    state = torch.stack([randn(B if cuts is None else len(cuts) - 1, D, seed=seed, grad=False) for seed in (3, 4)], 1)
    # Rows that have seen nothing yet, too.
    state[1::2, 0], state[1::2, 1] = 0, -1e38
    arguments: dict[str, Any] = {
        "w": (-(2 * randn(D, seed=5, grad=False)).exp()).requires_grad_(), "u": randn(D, seed=6),
        "k": k.requires_grad_(), "v": randn(B, T, D, seed=7),
        "initial_state": state.requires_grad_() if "state" in options else None,
        "reset": randn(B, T, seed=8, grad=False) > 1 if "reset" in options else None,
        "lengths": (torch.arange(B) * 7 + T // 2).clamp(max=T) if "lengths" in options else None,
        "cu_seqlens": None if cuts is None else torch.tensor(cuts),
    }  # fmt: skip
    label = f"B={B} T={T} D={D}"
    return Example(" ".join([label, *options, *(["packed"] if cuts is not None else [])]), arguments)


def workloads() -> Iterator[Workload]:
    """The layer of rwkv-4-169m on a CPU, as whole sequences and as one step; that of rwkv-4-7b on a GPU."""
    for batch, length in [(1, 1024), (1, 4096), (8, 1024), (1, 1)]:
        yield workload("cpu", batch, length, 768)
    for batch, length in [(1, 2048), (4, 8192), (32, 1024)]:
        yield workload("cuda", batch, length, 4096)


def workload(device: str, B: int, T: int, D: int) -> Workload:
    """One call as the layer makes it, with decays and bonuses as initialised."""

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)
        wide = torch.promote_types(dtype, torch.float32)
        k, v = torch.randn(2, B, T, D, device=device, dtype=dtype, generator=generator)
        made: dict[str, Tensor] = {"w": -(torch.linspace(-5, 3, D, device=device, dtype=wide).exp())}
        made |= {"u": torch.full((D,), -1.2, device=device, dtype=wide), "k": k, "v": v}
        return {name: value.detach().requires_grad_() for name, value in made.items()}

    def traffic(dtype: torch.dtype) -> float:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return float(3 * B * T * D * dtype.itemsize + (2 * B + 2) * D * wide)

    # Two sigmoids and a log of a sum per number, six sums and products.
    return Workload(f"B={B} T={T} D={D}", arguments, traffic, 14.0 * B * T * D, device)
