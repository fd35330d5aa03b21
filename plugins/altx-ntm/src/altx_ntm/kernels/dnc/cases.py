"""Calls of the DNC's time loop to verify and to time its backends with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from altx_kernels.examples import Example, Workload, randn
from altx_ntm.kernels.dnc.reference import Reads, Slots, Writes


def slots(batch: int, count: int, width: int, readers: int, seed: int = 0) -> Slots:
    """Slots in the midst of a sequence, no two used alike."""
    link = 0.5 * randn(batch, count, count, seed=seed + 1).softmax(-1) * (1 - torch.eye(count))
    ranks = torch.argsort(randn(batch, count, seed=seed + 3, grad=False)).double()
    return Slots(
        _leaf(randn(batch, count, width, seed=seed)),
        _leaf(link),
        _leaf(randn(batch, count, seed=seed + 2).softmax(-1)),
        _leaf((ranks + 0.5) / max(count, 1)),
        _leaf(randn(batch, readers, count, seed=seed + 4).softmax(-1)),
        _leaf(0.8 * randn(batch, count, seed=seed + 5).softmax(-1)),
    )


def call(
    batch: int, tokens: int, count: int, width: int, *, readers: int = 1, reading: bool = True, writing: bool = True,
    **rest: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a call with random numbers."""
    reads = Reads(
        _leaf(randn(batch, tokens, readers, width, seed=10)),
        _leaf(1 + 2 * randn(batch, tokens, readers, 1, seed=11).sigmoid()),
        _leaf(randn(batch, tokens, readers, 3, seed=12).softmax(-1)),
    )
    writes = Writes(
        _leaf(randn(batch, tokens, width, seed=20)),
        _leaf(1 + 2 * randn(batch, tokens, 1, seed=21).sigmoid()),
        _leaf(randn(batch, tokens, width, seed=22).sigmoid()),
        _leaf(randn(batch, tokens, width, seed=23)),
        _leaf(randn(batch, tokens, readers, seed=24).sigmoid()),
        _leaf(randn(batch, tokens, 1, seed=25).sigmoid()),
        _leaf(randn(batch, tokens, 1, seed=26).sigmoid()),
    )
    return {
        "slots": slots(batch, count, width, readers),
        "fresh": slots(batch, count, width, readers, seed=7),
        "reads": reads if reading else None,
        "writes": writes if writing else None,
        **rest,
    }


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def examples() -> Iterator[Example]:
    """Small calls that cover ragged sizes, every number of heads, masks and resets."""
    sizes = [(2, 9, 7, 4, 1), (1, 18, 16, 5, 2), (3, 4, 35, 20, 3), (2, 1, 8, 3, 1), (2, 0, 8, 3, 1), (0, 3, 8, 3, 1)]
    for batch, tokens, count, width, readers in [*sizes, (2, 3, 1, 1, 1)]:
        label = f"B={batch} T={tokens} N={count} W={width} R={readers}"
        yield Example(label, call(batch, tokens, count, width, readers=readers))
    mask = torch.tensor([[i % 5 not in (0, 3) for i in range(19)], [i < 17 for i in range(19)]])
    reset = torch.tensor([[i in (0, 4, 5, 16) for i in range(19)], [i in (9, 17) for i in range(19)]])
    # Not longer: usages come so close to each other that the rounding of a dtype decides which is less.
    flagged: dict[str, dict[str, Any]] = {
        "mask": {"mask": mask},
        "reset": {"reset": reset},
        "mask reset": {"mask": mask, "reset": reset},
        "read only": {"mask": mask, "reset": reset, "writing": False},
        "write only": {"mask": mask, "reset": reset, "reading": False},
    }
    for label, rest in flagged.items():
        yield Example(label, call(2, 19, 9, 4, readers=2, **rest))


def workloads() -> Iterator[Workload]:
    """The defaults of the layer, and a larger memory."""
    for batch, tokens, count, width, readers in [(16, 256, 32, 16, 2), (16, 128, 128, 32, 4)]:
        # Keys, erase, add and what is read; the slots before and after.
        numbers = batch * (tokens * (2 * readers * width + 3 * width + 5 * readers + 3) + 2 * count * (width + count))
        yield Workload(
            f"B={batch} T={tokens} N={count} W={width} R={readers}",
            partial(_timed, batch, tokens, count, width, readers),
            bytes=partial(_bytes, numbers),
            flops=batch * tokens * per_token(count, width, readers),
        )


def per_token(slots: int, width: int, readers: int) -> int:
    """Floating-point operations of a token: its link, its addresses, its write and reads."""
    return slots * (slots * (5 + 4 * readers) + width * (7 + 4 * readers) + 12 * readers + 12)


def _bytes(numbers: int, dtype: torch.dtype) -> float:
    return numbers * dtype.itemsize


def _timed(
    batch: int, tokens: int, count: int, width: int, readers: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().to(device, dtype).requires_grad_()
        return type(value)(*map(cast, value))

    return {name: cast(value) for name, value in call(batch, tokens, count, width, readers=readers).items()}
