"""The short causal convolution in PyTorch, for any device, with a backward pass that a CPU does well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast
from altx_kernels.packing import one_by_one


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = False,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if cu_seqlens is not None:
        return one_by_one(
            causal_conv1d, cu_seqlens, {"x": x, "reset": reset}, initial_state,
            weight=weight, bias=bias, activation=activation,
        )  # fmt: skip
    dtype = precise(x, weight, bias, initial_state)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    window, weight = torch.cat([initial_state.to(dtype), x.to(dtype)], 1), weight.to(dtype)
    if not x.numel():
        y = torch.zeros_like(window[:, : x.shape[1]])
    elif reset is not None:
        y = _within_sequences(window, weight, reset)
    elif x.shape[1] == 1:
        y = (window * weight.T).sum(1, keepdim=True)
    else:
        y = _Conv.apply(window, weight)  # type: ignore[no-untyped-call]
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if activation else y
    return y.to(x.dtype), last_inputs(window, weight.shape[1], reset, lengths).to(initial_state.dtype)


def last_inputs(window: Tensor, width: int, reset: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Each row's last K-1 inputs, those before its last reset as zeros: (B, K-1, D).

    Args:
        window: (B, K-1+T, D), the inputs before the call and those of the call.
        width: K.
        reset: (B, T) bool.
        lengths: (B,), how many tokens of each row count.
    """
    batch, tokens = window.shape[0], window.shape[1] - (width - 1)
    if lengths is None:
        lengths = torch.full((batch,), tokens, device=window.device)
    last = lengths[:, None] + torch.arange(width - 1, device=window.device)
    inputs = window.gather(1, last[..., None].expand(-1, -1, window.shape[2]))
    if reset is None:
        return inputs
    index = sequence_index(reset, width)
    now = index.gather(1, lengths[:, None] + width - 2) if width > 1 else index[:, :1]
    return torch.where((index.gather(1, last) == now)[..., None], inputs, 0)


def sequence_index(reset: Tensor, width: int) -> Tensor:
    """Which sequence of its row each input belongs to, from 0: (B, K-1+T), the K-1 inputs before the call included."""
    return F.pad(reset.cumsum(1), (width - 1, 0))


def _within_sequences(window: Tensor, weight: Tensor, reset: Tensor) -> Tensor:
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
