"""Functions of single numbers, with as few passes over memory as can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _SquaredReLU(torch.autograd.Function):
    """Keeps x alone for the backward pass, which is there anyway; autograd would keep two results more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        y = torch.relu(x)
        return y.mul_(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return times((x + x).relu_(), g)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    y: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return y


def times(fresh: Tensor, factor: Tensor | float) -> Tensor:
    """fresh * factor, in the memory of `fresh`, which nobody else knows, where no gradient may need it."""
    if torch.is_grad_enabled() or (isinstance(factor, Tensor) and fresh.dtype != factor.dtype):
        return fresh * factor
    return fresh.mul_(factor)


def affine(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, *, squash: bool = False) -> Tensor:
    """x down up + bias, with tanh in the middle if `squash`: x (B, T, D), down (D, R), up (R, E), bias (1, 1, E)."""
    inner = x @ down
    return F.linear(torch.tanh(inner) if squash else inner, up.T, bias.flatten())


def blend(x: Tensor, change: Tensor, fresh: Tensor) -> Tensor:
    """x + fresh * change, in the memory of `fresh`, which nobody else knows, where no gradient may need it."""
    if torch.is_grad_enabled():
        return torch.addcmul(x, change, fresh)
    return fresh.mul_(change).add_(x)
