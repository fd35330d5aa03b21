"""Calls of the gated RMS norm to verify and to time its backends with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from altx_kernels.examples import Example, Workload, randn


def call(*shape: int, groups: int = 1, gate: bool = True, gate_first: bool = True) -> dict[str, Any]:
    """Arguments of a call with random numbers."""
    return {
        "y": randn(*shape),
        "z": randn(*shape, seed=1) if gate else None,
        "weight": randn(shape[-1], seed=2),
        "eps": 1e-5,
        "group_size": shape[-1] // groups,
        "gate_first": gate_first,
    }


def examples() -> Iterator[Example]:
    """Small calls that cover ragged sizes, every kind of gate, and any number of dimensions."""
    for *shape, groups in [
        (2, 33, 64, 1), (2, 70, 21, 1), (1, 9, 70, 2), (3, 5, 12, 6), (2, 1, 40, 1), (1, 66, 2, 20, 1), (5, 9, 3),
        (18, 2), (0, 3, 8, 1), (2, 0, 8, 2),
    ]:  # fmt: skip
        label = f"{'x'.join(map(str, shape))} in {groups} groups"
        yield Example(label, call(*shape, groups=groups, gate=False))
        yield Example(f"{label}, gate first", call(*shape, groups=groups))
        yield Example(f"{label}, gate last", call(*shape, groups=groups, gate_first=False))


def workloads() -> Iterator[Workload]:
    """Mamba-2 of 130M parameters on a CPU, Mamba-3's heads there too; a layer of width 4096 on a GPU."""
    for batch, tokens, dim, group, first, device in [
        (1, 1024, 1536, 1536, True, "cpu"), (1, 1024, 1536, 64, False, "cpu"), (4, 4096, 4096, 4096, True, "cuda"),
        (4, 4096, 4096, 64, False, "cuda"),
    ]:  # fmt: skip
        yield Workload(
            f"B={batch} T={tokens} E={dim} in groups of {group}, gate {'first' if first else 'last'}",
            partial(_timed, batch, tokens, dim, group, first),
            bytes=partial(_bytes, batch * tokens, dim),
            flops=batch * tokens * dim * 9,
            device=device,
        )


def _timed(
    batch: int, tokens: int, dim: int, group: int, first: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    # z as part of a projection, as in a gated layer.
    both = torch.randn(batch, tokens, 2 * dim, device=device, dtype=dtype)
    return {
        "y": torch.randn(batch, tokens, dim, device=device, dtype=dtype).requires_grad_(),
        "z": both.requires_grad_().chunk(2, -1)[0],
        "weight": torch.randn(dim, device=device, dtype=dtype).requires_grad_(),
        "eps": 1e-5,
        "group_size": group,
        "gate_first": first,
    }


def _bytes(rows: int, dim: int, dtype: torch.dtype) -> float:
    return (3 * rows + 1) * dim * dtype.itemsize
