"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn

OPTIONS = ("D", "z", "dt_bias", "softplus", "state", "reset")


def examples() -> Iterator[Example]:
    """Ragged lengths and sizes; every option alone, all together, and all in a packed batch."""
    yield example(2, 33, 5, 3)
    for option in OPTIONS:
        yield example(2, 19, 7, 5, option)
    yield example(1, 67, 40, 16, *OPTIONS)
    yield example(2, 130, 33, 21, *OPTIONS)
    yield example(1, 35, 16, 64, "D", "z", "state")
    yield example(3, 16, 1, 1, "z", "state")
    yield example(2, 1, 37, 16, *OPTIONS)
    yield example(2, 1, 6, 4)
    yield example(2, 0, 5, 3, "D", "z", "state")
    yield example(0, 4, 5, 3, "D", "z", "state")
    yield example(1, 70, 20, 16, cuts=[0, 17, 17, 18, 70])
    yield example(1, 90, 18, 6, *OPTIONS, cuts=[0, 0, 33, 34, 50, 90, 90])


def example(B: int, T: int, D: int, N: int, *options: str, cuts: list[int] | None = None) -> Example:
    """One call with those of OPTIONS that are named. A tenth of the step sizes is exactly 0, some are past where the
    decay underflows. cuts: cu_seqlens."""
    held = randn(B, T, 1, seed=2, grad=False) < -1.3
    if "softplus" in options:
        dt = (2 * randn(B, T, D, seed=1, grad=False)).masked_fill(held, -torch.inf)
    else:
        dt = (1.5 * randn(B, T, D, seed=1, grad=False)).exp().masked_fill(held, 0)
        dt = dt.masked_fill(randn(B, T, D, seed=12, grad=False) > 2.5, 300)
    arguments: dict[str, Any] = {
        "x": randn(B, T, D, seed=3), "dt": dt.requires_grad_(),
        "A": (-randn(D, N, seed=4, grad=False).exp()).requires_grad_(),
        "B": randn(B, T, N, seed=5), "C": randn(B, T, N, seed=6),
        "D": randn(D, seed=7) if "D" in options else None,
        "z": randn(B, T, D, seed=8) if "z" in options else None,
        "dt_bias": randn(D, seed=9).abs().detach().requires_grad_() if "dt_bias" in options else None,
        "softplus": "softplus" in options,
        "initial_state": randn(B if cuts is None else len(cuts) - 1, D, N, seed=10) if "state" in options else None,
        "reset": randn(B, T, seed=11, grad=False) > 1 if "reset" in options else None,
        "cu_seqlens": None if cuts is None else torch.tensor(cuts),
    }  # fmt: skip
    label = f"B={B} T={T} D={D} N={N}"
    return Example(" ".join([label, *options, *(["packed"] if cuts is not None else [])]), arguments)


def workloads() -> Iterator[Workload]:
    """The layer of mamba-130m on a CPU, as whole sequences and as one step; that of mamba-1.4b on a GPU."""
    for batch, length in [(1, 1024), (1, 4096), (8, 1024), (1, 1)]:
        yield workload("cpu", batch, length, 1536)
    for batch, length in [(1, 2048), (1, 8192), (1, 32768), (4, 8192), (32, 1024)]:
        yield workload("cuda", batch, length, 4096)


def workload(device: str, B: int, T: int, D: int, N: int = 16) -> Workload:
    """One call as the layer makes it: softplus, skip and gate inside, A as initialised, x and z halves of a tensor."""

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        wide = torch.promote_types(dtype, torch.float32)
        x, z = normal(B, T, 2 * D, dtype=dtype).chunk(2, -1)
        made = {"x": x, "z": z, "dt": F.softplus(normal(B, T, D)).sub(1).to(wide)}
        made |= {"B": normal(B, T, N, dtype=dtype), "C": normal(B, T, N, dtype=dtype)}
        made["A"] = -torch.arange(1.0, N + 1, device=device, dtype=wide).repeat(D, 1)
        made |= {"D": normal(D).to(wide), "dt_bias": normal(D).sub(4).to(wide)}
        return {name: value.detach().requires_grad_() for name, value in made.items()} | {"softplus": True}

    def traffic(dtype: torch.dtype) -> float:
        # x, z, y, B, C; dt and weights are float32 at least; so is the state, which is written.
        numbers = B * T * (3 * D + 2 * N)
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return float(numbers * dtype.itemsize + (B * T * D + D * N + 2 * D + B * D * N) * wide)

    # Per state: dt A and its exponential, two for the decay and input added, one for dt x B, two for C h. Per channel:
    # softplus and its bias, dt x, the skip and the gate.
    flops = 7.0 * B * T * D * N + 11.0 * B * T * D
    return Workload(f"B={B} T={T} D={D} N={N}", arguments, traffic, flops, device)
