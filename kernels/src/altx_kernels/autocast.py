"""Keeping autocast out of an op: what it computes in is its own decision, not that of whoever calls it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, everything on `device` is computed in the dtypes it has."""
    # The meta device, on which shapes and FLOPs are counted, knows no autocast. Not asked of torch, whose 2.10 does not
    # compile the question.
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
