"""The short causal convolution in front of a recurrence, over a batch whose real tokens come first."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from altx.masking import RealFirst
from altx.state import Leaf
from altx_kernels.causal_conv1d import causal_conv1d

CONV = Leaf(kind="conv")
"""What the state of a convolution is."""


class ShortConv(nn.Module):
    """A depthwise causal convolution with the parameters of a `nn.Conv1d`, which start as those do.

    Args:
        channels: C.
        taps: K.
        bias: whether there is one.
        activation: whether silu follows.
    """

    def __init__(self, channels: int, taps: int, *, bias: bool = False, activation: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-(taps**-0.5), taps**-0.5)) if bias else None

    def forward(self, x: Tensor, batch: RealFirst, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the convolution makes of x (B, T, C), and the last inputs (B, K-1, C).

        Args:
            x: (B, T, C), in the order of `batch`.
            batch: what says where tokens are real and where a sequence starts.
            past: (B, K-1, C), the inputs before x.
        """
        return causal_conv1d(
            x, self.weight[:, 0], self.bias,
            initial_state=past, reset=batch.reset, lengths=batch.lengths, activation=self.activation,
        )  # fmt: skip
