"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn


def call(B: int, T: int, H: int, F: int, *options: str, scale: float = 1.0) -> dict[str, Any]:
    """Arguments of a call with random numbers.

    Args:
        options: of "state" and "reset"; "masked" has tokens without a key.
        scale: size of the exponents.
    """
    half = scale * randn(B, T, H, seed=2, grad=False).abs()
    if "masked" in options:
        half[:, 1::3] = torch.inf
    return {
        "a": (scale * randn(B, T, H, F, grad=False)).requires_grad_(),
        "b": (scale * randn(B, T, H, F, seed=1, grad=False)).requires_grad_(),
        "half": half.requires_grad_(),
        "M": randn(B, H, F, seed=3, grad=False) if "state" in options else None,
        "reset": randn(B, T, seed=4, grad=False) > 1 if "reset" in options else None,
    }


def examples() -> Iterator[Example]:
    """Ragged sizes, with and without a state, resets and masked tokens; exponents of ordinary size, and huge ones."""
    for sizes, options in [
        ((2, 33, 2, 5), ""), ((1, 70, 3, 21), "state"), ((2, 37, 1, 40), "reset"),
        ((1, 20, 2, 16), "state reset masked"), ((3, 1, 2, 9), "state"), ((2, 1, 1, 8), "reset"),
        ((2, 0, 2, 4), "state"), ((0, 5, 2, 4), ""), ((1, 6, 4, 1), ""),
    ]:  # fmt: skip
        label = " ".join(f"{name}={size}" for name, size in zip("BTHF", sizes, strict=True))
        yield Example(f"{label} {options}".strip(), call(*sizes, *options.split()))
    yield Example("B=2 T=30 H=2 F=19 huge", call(2, 30, 2, 19, "state", scale=15.0))


def workloads() -> Iterator[Workload]:
    """The widths of performer-pytorch's defaults, on a CPU and on a GPU."""
    yield workload("cpu", 1, 1024, 8, 266)
    yield workload("cpu", 8, 512, 8, 266)
    yield workload("cuda", 8, 4096, 8, 266)


def workload(device: str, B: int, T: int, H: int, F: int) -> Workload:
    """One call, from no keys."""

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        shapes = {"a": (B, T, H, F), "b": (B, T, H, F), "half": (B, T, H)}
        made = {n: torch.randn(s, device=device, dtype=dtype, generator=generator) for n, s in shapes.items()}
        return {name: x.requires_grad_() for name, x in made.items()}

    numbers = B * T * H * F
    return Workload(
        f"B={B} T={T} H={H} F={F}", arguments, lambda dtype: numbers * (4.0 * dtype.itemsize + 4), 9.0 * numbers, device
    )
