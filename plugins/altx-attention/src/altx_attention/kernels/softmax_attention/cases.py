"""Calls of the op to verify and to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn


def examples() -> Iterator[Example]:
    """Every option by itself and with others, over ragged lengths, shared heads, several documents and offsets."""
    yield example(2, 9, 9, 4, 4, 8, 8)
    yield example(1, 70, 70, 6, 2, 8, 8)
    yield example(2, 5, 12, 4, 2, 6, 6)
    yield example(2, 1, 12, 4, 2, 8, 8)
    yield example(2, 1, 70, 6, 2, 37, 20, scale=0.4)
    yield example(3, 1, 600, 2, 1, 8, 8, documents=True, offset=[0, 599, 300])
    yield example(2, 1, 70, 4, 4, 8, 5, softcap=1.5, sinks=True, window=40, offset=[3, 60])
    yield example(2, 1, 9, 2, 2, 8, 8, causal=False, documents=True, window=4)
    yield example(2, 7, 9, 2, 2, 8, 5, causal=False)
    yield example(2, 7, 7, 4, 1, 5, 12, scale=0.3)
    yield example(2, 0, 5, 4, 2, 4, 4)
    yield example(2, 7, 3, 4, 2, 4, 4)
    yield example(1, 12, 12, 4, 2, 8, 8, window=3)
    yield example(2, 300, 301, 2, 1, 4, 4, window=3, documents=True)
    yield example(2, 300, 300, 2, 1, 4, 4, window=2, causal=False, sinks=True)
    yield example(1, 150, 200, 2, 1, 4, 6, window=51, softcap=2.0)
    yield example(2, 6, 6, 4, 2, 8, 8, softcap=1.5)
    yield example(3, 20, 20, 4, 2, 8, 8, sinks=True)
    yield example(3, 2, 20, 4, 2, 8, 8, sinks=True, softcap=3.0, offset=[0, 5, 18])
    yield example(3, 18, 20, 4, 2, 8, 6, sinks=True, window=6, documents=True)
    yield example(2, 20, 20, 4, 2, 8, 6, sinks="each")
    yield example(2, 1, 20, 4, 2, 8, 8, sinks="each", offset=[3, 19])
    yield example(2, 300, 310, 2, 1, 4, 4, sinks="each", window=3)
    yield example(3, 4, 20, 4, 2, 8, 8, documents=True, offset=[0, 5, 16])
    yield example(2, 11, 11, 4, 4, 8, 8, documents=True, causal=False)


def example(
    B: int, T: int, S: int, H: int, G: int, D: int, E: int, *, sinks: bool | Literal["each"] = False,
    documents: bool = False, offset: list[int] | None = None, **options: Any,
) -> Example:  # fmt: skip
    """One call; `documents` are of some five tokens, and a few queries belong to one that has no slot.

    `sinks` are the heads', or each query's.
    """
    arguments: dict[str, Any] = {
        "q": randn(B, T, H, D, seed=1), "k": randn(B, S, G, D, seed=2), "v": randn(B, S, G, E, seed=3), **options,
        "sinks": randn(*((B, T, H) if sinks == "each" else (H,)), seed=4) if sinks else None,
        "offset": None if offset is None else torch.tensor(offset),
    }  # fmt: skip
    if documents:
        slot_document = (randn(B, S, seed=5, grad=False) > 0.8).cumsum(1)
        place = torch.arange(T) + (S - T) if offset is None else torch.tensor(offset)[:, None] + torch.arange(T)
        document = slot_document.gather(1, place.expand(B, T).clamp(min=0))
        document = torch.where(randn(B, T, seed=6, grad=False) > 1.5, -7, document)
        arguments |= {"document": document, "slot_document": slot_document}
    named = [f"{name}={value}" for name, value in options.items()]
    named += [f"sinks={sinks}"] * (sinks == "each") + ["sinks"] * (sinks is True) + ["documents"] * documents
    named += [] if offset is None else ["offset"]
    return Example(" ".join([f"B={B} T={T} S={S} H={H} G={G} D={D} E={E}", *named]), arguments)


def workloads() -> Iterator[Workload]:
    """Width 768 on a CPU, whole and decoding; an 8B model's heads on a GPU."""
    yield workload("cpu", 1, 1024, 1024, 12, 12, 64)
    yield workload("cpu", 1, 1024, 1024, 12, 12, 64, softcap=50.0)
    yield workload("cpu", 1, 1024, 1024, 12, 12, 64, sinks=True)
    yield workload("cpu", 1, 8192, 8192, 12, 12, 64, window=512)
    yield workload("cpu", 1, 1, 8192, 32, 8, 128)
    for T in (2048, 8192):
        yield workload("cuda", 4, T, T, 32, 8, 128)
        yield workload("cuda", 4, T, T, 32, 8, 128, window=1024)
        yield workload("cuda", 4, T, T, 32, 8, 128, softcap=50.0)


def workload(
    device: str, B: int, T: int, S: int, H: int, G: int, D: int, *, window: int | None = None, sinks: bool = False,
    softcap: float | None = None,
) -> Workload:  # fmt: skip
    """One causal call."""

    def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_()

        options = {"window": window, "softcap": softcap, "sinks": randn(H) if sinks else None}
        return {"q": randn(B, T, H, D), "k": randn(B, S, G, D), "v": randn(B, S, G, D), **options}

    seen = sum(min(S - T + t + 1, window or S) for t in range(T))
    label = f"B={B} T={T} S={S} H={H} G={G} D={D}"
    named = f"{label} window={window} softcap={softcap}".replace(" window=None", "").replace(" softcap=None", "")
    return Workload(
        named + " sinks" * sinks, arguments, lambda dtype: 2.0 * B * D * (T * H + S * G) * dtype.itemsize,
        4.0 * B * H * D * seen, device,
    )  # fmt: skip
