"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn

DECAYS = ("none", "head", "key")


def examples() -> Iterator[Example]:
    """Every kind of decay over ragged lengths, with and without states, resets and packing."""
    for decay in DECAYS:
        yield example(decay, 2, 33, 2, 5, 7, state=True)
        yield example(decay, 1, 130, 1, 16, 24)
        yield example(decay, 1, 67, 2, 20, 70, reset=True)
        yield example(decay, 2, 1, 2, 6, 18, state=True)
        yield example(decay, 2, 1, 2, 8, 8, reset=True)
        yield example(decay, 2, 0, 2, 4, 4, state=True)
        yield example(decay, 1, 90, 2, 9, 11, state=True, reset=True, cuts=[0, 17, 17, 18, 90])
    for decay in ("head", "key"):
        yield example(decay, 1, 70, 2, 6, 10, state=True, strong=True)


def example(
    decay: str, B: int, T: int, H: int, K: int, V: int, *, state: bool = False, reset: bool = False,
    cuts: list[int] | None = None, strong: bool = False,
) -> Example:  # fmt: skip
    """One call, with a = -beta k and b = k but for noise, so that S stays bounded and nothing is symmetric.

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
    k = F.normalize(randn(B, T, H, K, seed=2, grad=False), dim=-1)
    noise = 0.1 * randn(B, T, H, K, seed=3, grad=False)
    rows = B if cuts is None else len(cuts) - 1
    arguments: dict[str, Any] = {
        "q": randn(B, T, H, K, seed=4), "k": k.clone().requires_grad_(), "v": randn(B, T, H, V, seed=5),
        "a": (-torch.sigmoid(randn(B, T, H, 1, seed=6, grad=False)) * k + noise / K**0.5).requires_grad_(),
        "b": (k - noise / K**0.5).requires_grad_(), "g": g,
        "initial_state": randn(rows, H, K, V, seed=7) if state else None,
        "reset": randn(B, T, seed=8, grad=False) > 1 if reset else None,
        "cu_seqlens": None if cuts is None else torch.tensor(cuts),
    }  # fmt: skip
    named = {"state": state, "reset": reset, "packed": cuts is not None, "strong": strong}
    label = f"decay={decay} B={B} T={T} H={H} K={K} V={V}"
    return Example(" ".join([label, *(name for name, there in named.items() if there)]), arguments)


def workloads() -> Iterator[Workload]:
    """Gated DeltaNet and RWKV-7 at width 768 on a CPU, and the shapes that GPU kernels are compared at."""
    yield workload("cpu", "head", 1, 1024, 6, 128, 128)
    yield workload("cpu", "key", 1, 1024, 12, 64, 64)
    for N, T, H in [(1, 2048, 16), (1, 8192, 16), (1, 32768, 32), (4, 8192, 64), (32, 1024, 16)]:
        for decay in ("head", "key"):
            yield workload("cuda", decay, N, T, H, 128, 128)


def workload(device: str, decay: str, B: int, T: int, H: int, K: int, V: int) -> Workload:
    """One call, from a zero state: q and k of length 1, a = -beta k, b = k, decays around 0.95."""

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(B, T, H, *shape, device=device, dtype=torch.float32, generator=generator)

        k = F.normalize(normal(K), dim=-1)
        made = {
            "q": F.normalize(normal(K), dim=-1), "k": k, "v": normal(V), "a": -torch.sigmoid(normal(1)) * k, "b": k,
            "g": F.logsigmoid(normal(*[K] * (decay == "key")) + 3),
        }  # fmt: skip
        return {name: x.to(dtype).clone().requires_grad_() for name, x in made.items()}

    def traffic(dtype: torch.dtype) -> float:
        numbers = B * T * H * (4 * K + 2 * V + (K if decay == "key" else 1))
        return numbers * dtype.itemsize + B * H * K * V * 4

    # A multiplication and an addition each for b^T S, a u^T, k v^T and q S, and the decay of S.
    flops = 9.0 * B * T * H * K * V
    return Workload(f"decay={decay} B={B} T={T} H={H} K={K} V={V}", arguments, traffic, flops, device)
