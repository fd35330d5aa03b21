"""Calls of the short causal convolution to verify and to time its backends with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from altx_kernels.examples import Example, Workload, randn


def call(
    batch: int, tokens: int, dim: int, width: int, *, bias: bool = True, state: bool = False, activation: bool = False
) -> dict[str, Any]:
    """Arguments of a call with random numbers."""
    return {
        "x": randn(batch, tokens, dim),
        "weight": randn(dim, width, seed=1),
        "bias": randn(dim, seed=2) if bias else None,
        "initial_state": randn(batch, width - 1, dim, seed=3) if state else None,
        "activation": activation,
    }


def examples() -> Iterator[Example]:
    """Small calls that cover ragged sizes and every option."""
    for batch, tokens, dim, width in [
        (2, 33, 21, 4), (1, 8, 16, 4), (2, 17, 35, 3), (3, 9, 1, 2), (2, 300, 3, 4), (2, 5, 6, 1), (2, 7, 5, 11),
        (1, 30, 7, 13),
    ]:  # fmt: skip
        label = f"B={batch} T={tokens} D={dim} K={width}"
        yield Example(label, call(batch, tokens, dim, width, bias=False))
        yield Example(f"{label} state silu", call(batch, tokens, dim, width, state=True, activation=True))
    for tokens in (0, 1):
        yield Example(f"T={tokens} state silu", call(2, tokens, 20, 4, state=True, activation=True))
        yield Example(f"T={tokens}", call(2, tokens, 20, 4))
    yield Example("B=0", call(0, 5, 4, 3, state=True))

    reset = torch.tensor([[i % 11 in (2, 3) for i in range(29)], [i in (0, 28) for i in range(29)]])
    lengths = torch.tensor([0, 23])
    for state in (False, True):
        tag = " state" if state else ""
        arguments = call(2, 29, 19, 4, state=state, activation=True)
        yield Example(f"reset{tag}", arguments | {"reset": reset})
        yield Example(f"lengths{tag}", arguments | {"lengths": lengths})
        yield Example(f"reset lengths{tag}", arguments | {"reset": reset, "lengths": lengths.flip(0)})
        packed = call(1, 29, 19, 4, activation=True) | {"cu_seqlens": torch.tensor([0, 2, 2, 13, 29])}
        if state:
            packed |= {"initial_state": randn(4, 3, 19)}
        yield Example(f"packed{tag}", packed)
        yield Example(f"packed reset{tag}", packed | {"reset": reset[:1]})


def workloads() -> Iterator[Workload]:
    """Mamba-1 of 130M parameters on a CPU; a layer of width 4096 on a GPU."""
    for batch, tokens, dim, device in [
        (1, 1024, 1536, "cpu"), (8, 1024, 1536, "cpu"), (1, 8192, 4096, "cuda"), (8, 4096, 4096, "cuda"),
    ]:  # fmt: skip
        yield Workload(
            f"B={batch} T={tokens} D={dim} K=4 silu",
            partial(_timed, batch, tokens, dim),
            bytes=partial(_bytes, batch, tokens, dim),
            flops=batch * tokens * dim * (2 * 4 + 1 + 4),
            device=device,
        )


def _timed(batch: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    # x as half of a projection, as in a gated layer.
    both = torch.randn(batch, tokens, 2 * dim, device=device, dtype=dtype)
    return {
        "x": both.requires_grad_().chunk(2, -1)[0],
        "weight": torch.randn(dim, 4, device=device, dtype=dtype).requires_grad_(),
        "bias": torch.randn(dim, device=device, dtype=dtype).requires_grad_(),
        "activation": True,
    }


def _bytes(batch: int, tokens: int, dim: int, dtype: torch.dtype) -> float:
    return (2 * batch * tokens * dim + 5 * dim + 3 * batch * dim) * dtype.itemsize
