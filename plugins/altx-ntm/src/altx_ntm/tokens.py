"""What a context says of the tokens that a memory hears."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.context import Context


def real(x: Tensor, ctx: Context) -> Tensor:
    """x with 0 at masked tokens, where it may hold anything, NaN included."""
    return x if ctx.mask is None else torch.where(ctx.mask[..., None], x, 0)


def resets(ctx: Context) -> Tensor | None:
    """(B, T) bool: the real tokens that start afresh."""
    return ctx.reset if ctx.reset is None or ctx.mask is None else ctx.reset & ctx.mask
