"""One softmax over the slots of attention and over what a memory holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from altx.memory import Attended

LEAST = -1e3
"""Smallest weight handed to a kernel, as a logarithm: next to any slot it is 0, and float16 holds it."""


def joined(near: Callable[[Tensor, Tensor | None], Tensor], v: Tensor, sinks: Tensor | None, far: Attended) -> Tensor:
    """(B, T, H, D) from both, as if all keys had stood side by side; or, where the memory has a gate, mixed by it.

    To the slots, the keys of the memory are a sink of their weight. A feature of 1 in each value comes back as the
    share of the slots; the rest is the sinks' and the memory's.

    Args:
        near: (B, T, H, E) attention to the slots from values (B, S, G, E) and sinks (B, T, H).
        v: (B, S, G, D).
        sinks: (H,), which each head has besides, or None.
        far: attention to the memory alone.
    """
    if far.share is not None:
        alone = near(v, sinks)
        share: Tensor = far.share[..., None].to(alone.dtype)
        return alone + share * (far.value.to(alone.dtype) - alone)
    weight = far.weight.clamp(min=LEAST)
    whole = weight if sinks is None else torch.logaddexp(weight, sinks.to(weight.dtype).expand_as(weight))
    y = near(F.pad(v, (0, 1), value=1.0), whole)
    share = (1 - y[..., -1:].to(weight.dtype)) * (weight - whole).exp()[..., None]
    return y[..., :-1] + (share * far.value).to(y.dtype)
