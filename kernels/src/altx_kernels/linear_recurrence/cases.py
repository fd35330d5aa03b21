"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn

DECAYS = ("none", "head", "channel")


def examples() -> Iterator[Example]:
    """Every kind of decay over ragged lengths, with and without states, resets and packing."""
    for decay in DECAYS:
        for B, T, H, G, K, V in [(2, 33, 4, 2, 5, 7), (1, 130, 2, 1, 16, 24), (1, 67, 3, 3, 20, 40)]:
            yield example(decay, B, T, H, G, K, V, state=T == 33, reset=T == 67)
        yield example(decay, 2, 1, 4, 2, 6, 18, state=True)
        yield example(decay, 2, 1, 2, 1, 8, 8, reset=True)
        yield example(decay, 2, 0, 2, 1, 4, 4, state=True)
        yield example(decay, 1, 90, 2, 1, 9, 11, state=True, reset=True, cuts=[0, 17, 17, 18, 90])
    for decay in ("head", "channel"):
        yield example(decay, 1, 70, 2, 1, 6, 10, state=True, strong=True)


def example(
    decay: str, B: int, T: int, H: int, G: int, K: int, V: int, *, state: bool = False, reset: bool = False,
    cuts: list[int] | None = None, strong: bool = False,
) -> Example:  # fmt: skip
    """One call.

    Args:
        cuts: cu_seqlens.
        strong: decays from nothing at all to everything, -inf among them.
    """
    g = None
    if decay != "none":
        shape = (B, T, H) if decay == "head" else (B, T, H, K)
        g = F.logsigmoid(randn(*shape, seed=1, grad=False) * (60 if strong else 2))
        if strong:
            g[:, ::9] = -torch.inf
        g.requires_grad_()
    rows = B if cuts is None else len(cuts) - 1
    arguments: dict[str, Any] = {
        "q": randn(B, T, G, K, seed=2), "k": randn(B, T, G, K, seed=3), "v": randn(B, T, H, V, seed=4), "g": g,
        "initial_state": randn(rows, H, K, V, seed=5) if state else None,
        "reset": randn(B, T, seed=6, grad=False) > 1 if reset else None,
        "cu_seqlens": None if cuts is None else torch.tensor(cuts),
    }  # fmt: skip
    named = {"state": state, "reset": reset, "packed": cuts is not None, "strong": strong}
    label = f"decay={decay} B={B} T={T} H={H} G={G} K={K} V={V}"
    return Example(" ".join([label, *(name for name, there in named.items() if there)]), arguments)


def workloads() -> Iterator[Workload]:
    """Mamba-2 at width 768 and GLA on a CPU; the shapes that GPU kernels are compared at, and Mamba-2's."""
    yield workload("cpu", "head", 1, 1024, 24, 1, 128, 64)
    yield workload("cpu", "channel", 1, 1024, 4, 4, 128, 256)
    yield workload("cpu", "head", 8, 512, 24, 1, 128, 64)
    for N, T, H in [(1, 2048, 16), (1, 8192, 16), (1, 32768, 32), (4, 8192, 64), (32, 1024, 16)]:
        for decay in ("head", "channel"):
            yield workload("cuda", decay, N, T, H, H, 128, 128)
    yield workload("cuda", "head", 8, 4096, 32, 1, 128, 64)


def workload(device: str, decay: str, B: int, T: int, H: int, G: int, K: int, V: int) -> Workload:
    """One call, from a zero state."""
    shapes = {"q": (B, T, G, K), "k": (B, T, G, K), "v": (B, T, H, V), "g": (B, T, H)}
    if decay == "channel":
        shapes["g"] = (B, T, H, K)

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        made = {n: torch.randn(s, device=device, dtype=dtype, generator=generator) for n, s in shapes.items()}
        made["k"] = made["k"] * K**-0.5
        made["g"] = F.logsigmoid(made["g"] + 3)
        return {name: x.requires_grad_() for name, x in made.items()}

    def traffic(dtype: torch.dtype) -> float:
        numbers = B * T * (2 * G * K + 2 * H * V + H * (K if decay == "channel" else 1))
        return numbers * dtype.itemsize + B * H * K * V * 4

    # A multiplication and an addition for k v^T + S, the same for q S, and the decay of S.
    flops = 5.0 * B * T * H * K * V
    return Workload(f"decay={decay} B={B} T={T} H={H} G={G} K={K} V={V}", arguments, traffic, flops, device)
