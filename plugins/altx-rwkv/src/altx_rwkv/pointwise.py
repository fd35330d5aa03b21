"""Functions of single numbers, with as few passes over memory as can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SquaredReLU(torch.autograd.Function):
    """Keeps x alone for the backward pass, which is there anyway; autograd would keep two results more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.relu(x).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.relu(x).mul_(2).mul_(g)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2; no second derivative."""
    y: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return y


def times(fresh: Tensor, factor: Tensor) -> Tensor:
    """fresh * factor, in the memory of `fresh`, which nobody else knows, where no gradient may need it."""
    if torch.is_grad_enabled() or fresh.dtype != factor.dtype:
        return fresh * factor
    return fresh.mul_(factor)
