"""Calls of the op to verify and to time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn

FORMS = ("real", "complex", "low-rank")


def examples() -> Iterator[Example]:
    """Ragged lengths and sizes in all three forms, every option alone and all together."""
    for form in FORMS:
        skip = () if form == "complex" else ("D",)
        yield example(form, 2, 33, 5, 3)
        for option in (*skip, "state", "reset", "lengths"):
            yield example(form, 2, 19, 7, 5, option)
        yield example(form, 3, 67, 20, 9, *skip, "state", "reset", "lengths")
        yield example(form, 2, 130, 33, 8, *skip, "state", "reset", "lengths")
        yield example(form, 1, 40, 37, 1, "state")
        yield example(form, 2, 1, 18, 19, *skip, "state", "reset", "lengths")
        yield example(form, 2, 1, 3, 4)
        yield example(form, 2, 0, 5, 3, *skip, "state")
        yield example(form, 0, 4, 5, 3, *skip, "state")


def example(form: str, B: int, T: int, H: int, N: int, *options: str) -> Example:
    """One call in one of FORMS. The states turn, and decay within some tokens or hundreds of them."""
    decay = (randn(H, N, seed=1, grad=False) - 1.5).exp()
    rate = torch.expm1(torch.complex(-decay, 2 * randn(H, N, seed=2, grad=False)))
    low_rank = form == "low-rank"
    if low_rank:
        decay = 1 - (1 + rate).abs().square()  # with w = that small it stays one
    last = torch.arange(B) * 5 % (T + 1)
    arguments: dict[str, Any] = {
        "x": randn(B, T, 2, H, seed=3) if form == "complex" else randn(B, T, H, seed=3),
        "rate": torch.stack([rate.real, rate.imag], 1).requires_grad_(),
        "c": randn(H, 2, N, seed=4),
        "b": randn(H, 2, N, seed=5) if low_rank else None,
        "w": (randn(H, 2, N, seed=6, grad=False) * decay[:, None] / (2 * N)).requires_grad_() if low_rank else None,
        "v": (randn(H, 2, N, seed=7, grad=False) / 2).requires_grad_() if low_rank else None,
        "D": randn(H, seed=8) if "D" in options else None,
        "initial_state": randn(B, H, 2, N, seed=9) if "state" in options else None,
        "reset": randn(B, T, seed=10, grad=False) > 1 if "reset" in options else None,
        "lengths": last if "lengths" in options else None,
    }
    return Example(" ".join([form, f"B={B} T={T} H={H} N={N}", *options]), arguments)


def workloads() -> Iterator[Workload]:
    """Layers of width 768 with 64 real states (32 complex ones) on a CPU, as whole sequences and as one step."""
    for form in ("real", "low-rank"):
        for batch, length in [(1, 1024), (1, 4096), (8, 1024), (1, 1)]:
            yield workload("cpu", form, batch, length, 768, 32)
        for batch, length in [(1, 4096), (1, 32768), (32, 1024)]:
            yield workload("cuda", form, batch, length, 768, 32)
    for device, batch, length in [("cpu", 1, 1024), ("cpu", 1, 1), ("cuda", 1, 32768), ("cuda", 32, 1024)]:
        yield workload(device, "complex", batch, length, 128, 1)


def workload(device: str, form: str, B: int, T: int, H: int, N: int) -> Workload:
    """One call as a layer makes it."""
    planes = 2 if form == "complex" else 1

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = wide) -> Tensor:
            return (scale * torch.randn(shape, device=device, generator=generator)).to(dtype)

        dt = 0.001 * 100 ** torch.rand(H, 1, device=device, generator=generator)
        turn = dt * math.pi * torch.arange(N, device=device)
        rate = torch.expm1(torch.complex(-dt / 2 * torch.ones_like(turn), turn))
        made = {"x": normal(B, T, 2, H, dtype=dtype) if planes == 2 else normal(B, T, H, dtype=dtype)}
        made |= {"rate": torch.stack([rate.real, rate.imag], 1).to(wide), "c": normal(H, 2, N)}
        if form == "low-rank":
            small = 0.001 / N
            made |= {"b": normal(H, 2, N), "w": normal(H, 2, N, scale=small), "v": normal(H, 2, N, scale=0.1)}
        if planes == 1:
            made["D"] = normal(H)
        return {name: value.detach().requires_grad_() for name, value in made.items()}

    def traffic(dtype: torch.dtype) -> float:
        # x and y; the weights and the final state, which are float32 at least.
        weights = {"real": 2, "complex": 2, "low-rank": 5}[form]
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return float(2 * planes * B * T * H * dtype.itemsize + (weights + B) * 2 * H * N * wide)

    # Per complex state: 9 to advance by a real input, 4 to read the real part out; 18 more with b, w and v.
    flops = {"real": 13.0, "complex": 18.0, "low-rank": 31.0}[form] * B * T * H * N
    return Workload(f"{form} B={B} T={T} H={H} N={N}", arguments, traffic, flops, device)
