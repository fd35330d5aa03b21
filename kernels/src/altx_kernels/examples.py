"""Calls of an op: small ones that its backends are verified with, large ones that they are timed with.

What an op offers as `examples` covers ragged lengths, T = 0 and T = 1, sizes that are no multiple of a vector's
width, initial states, resets, packing (cu_seqlens), every optional argument given and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One call to verify.

    Args:
        label: what is special about it, e.g. "T=33 state reset".
        arguments: by name: float64 tensors on the CPU (those that are differentiable require gradients), bool and
            integer tensors, numbers, None. The verifier casts and moves the floating ones.
    """

    label: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """One call to time.

    Args:
        label: its sizes, e.g. "B=1 T=2048 D=1536 N=16".
        arguments: makes the call's arguments, given device and dtype; differentiable ones require gradients.
        bytes: compulsory traffic of the forward pass in bytes, at that dtype: each input read and each output written
            once.
        flops: floating-point operations of the forward pass, an exponential counted as one.
        device: where the shape makes sense: "cpu", "cuda", or "" for both.
    """

    label: str
    arguments: Callable[[torch.device, torch.dtype], dict[str, Any]]
    bytes: Callable[[torch.dtype], float]
    flops: float
    device: str = ""


def randn(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    """Normal float64 numbers that depend on nothing but shape and seed."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)
