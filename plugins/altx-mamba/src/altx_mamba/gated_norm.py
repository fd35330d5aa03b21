"""The norm of Mamba-2 and Mamba-3, gated at their ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from altx_kernels.gated_rms_norm import gated_rms_norm


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, with a gate silu(z) before it or after it.

    Args:
        dim: channels.
        group_size: channels that are normed together.
        eps: added to the mean square.
        gate_first: norm(y silu(z)) instead of norm(y) silu(z).
    """

    def __init__(self, dim: int, *, group_size: int, eps: float, gate_first: bool = True) -> None:
        super().__init__()
        self.group_size = group_size
        self.eps = eps
        self.gate_first = gate_first
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """y and z (..., dim); without z there is no gate. Computes in float32 at least, returns the dtype of y."""
        return gated_rms_norm(y, z, self.weight, eps=self.eps, group_size=self.group_size, gate_first=self.gate_first)
