"""Calls of the NTM's time loop to verify and to time its backends with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from altx_kernels.examples import Example, Workload, randn
from altx_ntm.kernels.ntm.reference import Heads, Slots, Writes


def heads(batch: int, tokens: int, count: int, width: int, shifts: int, seed: int) -> Heads:
    """Where heads look. Not so sharply that errors of rounding grow from token to token."""
    return Heads(
        _leaf(randn(batch, tokens, count, width, seed=seed).tanh()),
        _leaf(2 * randn(batch, tokens, count, 1, seed=seed + 1).sigmoid()),
        _leaf(randn(batch, tokens, count, 1, seed=seed + 2).sigmoid()),
        _leaf(randn(batch, tokens, count, shifts, seed=seed + 3).softmax(-1)),
        _leaf(1 + randn(batch, tokens, count, 1, seed=seed + 4).sigmoid()),
    )


def slots(batch: int, count: int, width: int, readers: int, writers: int, seed: int = 0) -> Slots:
    """A memory and addresses."""
    return Slots(
        _leaf(randn(batch, count, width, seed=seed)),
        _leaf(randn(batch, readers, count, seed=seed + 1).softmax(-1)),
        _leaf(randn(batch, writers, count, seed=seed + 2).softmax(-1)),
    )


def call(
    batch: int, tokens: int, count: int, width: int, *, readers: int = 1, writers: int = 1, shift: int = 1,
    reading: bool = True, writing: bool = True, **rest: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a call with random numbers."""
    writes = Writes(
        heads(batch, tokens, writers, width, 2 * shift + 1, seed=20),
        _leaf(randn(batch, tokens, writers, width, seed=30).sigmoid()),
        _leaf(randn(batch, tokens, writers, width, seed=31).tanh()),
    )
    return {
        "slots": slots(batch, count, width, readers, writers),
        "fresh": slots(batch, count, width, readers, writers, seed=5),
        "reads": heads(batch, tokens, readers, width, 2 * shift + 1, seed=10) if reading else None,
        "writes": writes if writing else None,
        **rest,
    }


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def examples() -> Iterator[Example]:
    """Small calls that cover ragged sizes, both orders, every number of heads, masks and resets."""
    for write_first in (False, True):
        order = "write-read" if write_first else "read-write"
        sizes: list[tuple[int, int, int, int, dict[str, Any]]] = [
            (2, 9, 7, 4, {}),
            (1, 37, 16, 5, {"readers": 2, "writers": 3, "shift": 2}),
            (3, 4, 35, 20, {"readers": 3, "shift": 3}),
            (2, 1, 8, 3, {"writers": 2}),
            (2, 0, 8, 3, {}),
            (0, 3, 8, 3, {}),
        ]
        for batch, tokens, count, width, settings in sizes:
            label = f"{order} B={batch} T={tokens} N={count} W={width}"
            yield Example(label, call(batch, tokens, count, width, write_first=write_first, **settings))
        mask = torch.tensor([[i % 5 not in (0, 3) for i in range(35)], [i < 30 for i in range(35)]])
        reset = torch.tensor([[i in (0, 4, 5, 32) for i in range(35)], [i in (17, 33) for i in range(35)]])
        rest: dict[str, Any] = {"readers": 2, "writers": 2, "write_first": write_first}
        yield Example(f"{order} mask", call(2, 35, 9, 4, mask=mask, **rest))
        yield Example(f"{order} reset", call(2, 35, 9, 4, reset=reset, **rest))
        yield Example(f"{order} mask reset", call(2, 35, 9, 4, mask=mask, reset=reset, **rest))
        yield Example(f"{order} read only", call(2, 35, 9, 4, mask=mask, reset=reset, writing=False, **rest))
        yield Example(f"{order} write only", call(2, 35, 9, 4, mask=mask, reset=reset, reading=False, **rest))


def workloads() -> Iterator[Workload]:
    """The defaults of the layer, and the sizes of the paper's copy task."""
    for batch, tokens, count, width in [(16, 256, 64, 16), (16, 128, 128, 20)]:
        # Keys, erase, add and what is read; the slots before and after.
        numbers = batch * (tokens * (5 * width + 12) + 2 * count * (width + 2))
        yield Workload(
            f"B={batch} T={tokens} N={count} W={width}",
            partial(_timed, batch, tokens, count, width),
            bytes=partial(_bytes, numbers),
            flops=batch * tokens * count * (2 * (2 * width + 18) + 2 * width * 2 + 5 * width),
        )


def _bytes(numbers: int, dtype: torch.dtype) -> float:
    return numbers * dtype.itemsize


def _timed(batch: int, tokens: int, count: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().to(device, dtype).requires_grad_()
        return type(value)(*map(cast, value))

    return {name: cast(value) for name, value in call(batch, tokens, count, width).items()}
