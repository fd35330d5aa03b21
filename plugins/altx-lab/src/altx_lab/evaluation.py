"""Held-out bits per byte, read as a stream: through the state that a model carries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from altx.capabilities import split_plan
from altx.context import Context
from altx.model import Model

STRIPS = 16


def streams(model: Model) -> bool:
    """Whether the state is carried along a text: if it can be, and does not keep every token.

    A model whose state grows with the text has in training seen no two tokens further apart than a window,
    and would be measured on what it never learnt.
    """
    capabilities = model.capabilities
    return capabilities.steps and capabilities.max_len is None and capabilities.growth != "linear"


def how(model: Model, length: int) -> str:
    """The way `bits_per_byte` reads a text with this model, in words."""
    if streams(model):
        return "the state carried along each of its strips"
    reason = "its state grows with the text" if model.capabilities.max_len is None else "it takes no longer ones"
    return f"independent windows of {length} bytes, because {reason}"


def strips(data: bytes) -> tuple[Tensor, Tensor]:
    """A text as contiguous strips of nearly equal length, side by side.

    Returns:
        tokens (B, T) int64 and real (B, T) bool, which is False where a strip is one byte shorter.
    """
    rows = min(STRIPS, len(data) // 2)
    cuts = [row * len(data) // rows for row in range(rows + 1)]
    lengths = torch.tensor([stop - start for start, stop in pairwise(cuts)])
    width = int(lengths.max())
    padded = b"".join(data[start:stop].ljust(width, b"\0") for start, stop in pairwise(cuts))
    tokens = torch.frombuffer(bytearray(padded), dtype=torch.uint8).reshape(rows, width).long()
    return tokens, torch.arange(width) < lengths[:, None]


@torch.inference_mode()
def bits_per_byte(
    model: Model, data: bytes, length: int, *, seed: int = 0, stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean code length of a text in bits per predicted byte.

    Every byte but the first of each strip is predicted exactly once.

    Args:
        length: bytes per call; where the state is not carried, also the most context that a byte has.
        seed: of what a stochastic layer draws.
        stop: asked before each call; if it says yes there is no result.
    """
    device = next(model.parameters()).device
    tokens, real = (tensor.to(device) for tensor in strips(data))
    inputs, targets, real = tokens[:, :-1], tokens[:, 1:], real[:, 1:]
    generator = torch.Generator(device).manual_seed(seed)
    state = model.init_state(len(inputs), capacity=inputs.shape[1]) if streams(model) else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for piece in _pieces(model, inputs.shape[1], length):
        if stop():
            return None
        out = model(inputs[:, piece], Context(generator=generator), state)
        state = out.state if state is not None else None
        nats = F.cross_entropy(out.y.flatten(0, 1).float(), targets[:, piece].flatten(), reduction="none")
        total += (nats.double() * real[:, piece].flatten()).sum()
    return float(total / real.sum()) / math.log(2)


def _pieces(model: Model, total: int, length: int) -> Iterator[slice]:
    """Consecutive slices of at most `length` tokens that the model accepts."""
    for start in range(0, total, length):
        n = min(length, total - start)
        for size in split_plan(start, n, model.capabilities) if streams(model) else [n]:
            yield slice(start, start + size)
            start += size
