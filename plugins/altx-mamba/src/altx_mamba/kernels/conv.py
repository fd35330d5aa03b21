"""The short causal convolution in PyTorch, with a backward pass that a CPU does well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from altx.layout import take
from altx_kernels.autocast import no_autocast


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """As `reference.causal_conv1d`."""
    batch, length, dim = x.shape
    width = weight.shape[1]
    # Under autocast, weights and states may be wider than x.
    weight = weight.to(x.dtype)
    past = x.new_zeros(batch, width - 1, dim) if initial_state is None else initial_state.to(x.dtype)
    window = torch.cat([past, x], 1)
    if length == 0:
        return x
    if reset is not None:
        y = _conv_within_sequences(window, weight, reset)
    elif length == 1:
        y = (window * weight.T).sum(1, keepdim=True)
    else:
        y = _Conv.apply(window, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(x.dtype)


def sequence_index(reset: Tensor, width: int) -> Tensor:
    """Which sequence of its row each input belongs to, from 0: (B, K-1+T), the K-1 inputs before the call included."""
    return F.pad(reset.cumsum(1), (width - 1, 0))


def last_inputs(past: Tensor, x: Tensor, mask: Tensor | None, reset: Tensor | None) -> Tensor:
    """The state after a call: each row's last K-1 real inputs, those from before its last reset as zeros.

    Args:
        past: (B, K-1, D), the state before.
        x: (B, T, D), real tokens first.
        mask: (B, T) bool, where tokens are real; no other may reset.
        reset: (B, T) bool.
    """
    keep, length = past.shape[1], x.shape[1]
    window = torch.cat([past.to(x.dtype), x], 1)
    if mask is None:
        last = torch.arange(length, length + keep, device=x.device).expand(len(x), -1)
    else:
        last = mask.sum(1, keepdim=True) + torch.arange(keep, device=x.device)
    inputs = take(window, last)
    if reset is not None:
        index = sequence_index(reset, keep + 1)
        inputs = torch.where((take(index, last) == index[:, -1:])[..., None], inputs, 0)
    return inputs.to(past.dtype)


def _conv_within_sequences(window: Tensor, weight: Tensor, reset: Tensor) -> Tensor:
    """The convolution, no tap of which reaches back across a reset: (B, K-1+T, D) -> (B, T, D)."""
    length, width = reset.shape[1], weight.shape[1]
    index = sequence_index(reset, width)
    y = window[:, width - 1 :] * weight[:, -1]
    for j in range(width - 1):
        same = index[:, j : j + length] == index[:, width - 1 :]
        y = y + torch.where(same[..., None], window[:, j : j + length], 0) * weight[:, j]
    return y


class _Conv(torch.autograd.Function):
    """The convolution of a padded input: (B, K-1+T, D), (D, K) -> (B, T, D).

    Autograd's own backward pass takes over ten times as long as the forward one. The input's gradient is a
    convolution again, the weight's a sum of products per tap.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _conv(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        length, width = dy.shape[1], weight.shape[1]
        dx = _conv(F.pad(dy, (0, 0, width - 1, width - 1)), weight.flip(1))
        taps = [(x[:, j : j + length] * dy).sum((0, 1)) for j in range(width)]
        return dx, torch.stack(taps, 1)


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise over (B, T, D): a two-dimensional one of height 1, which needs no transposed copy."""
    with no_autocast(x.device):
        return F.conv2d(x.mT[:, :, None], weight[:, None, None], groups=len(weight))[:, :, 0].mT
