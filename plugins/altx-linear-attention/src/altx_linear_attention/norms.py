"""Norms of single heads: of what a recurrence returns, gated, and of queries and keys."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from altx_kernels.gated_rms_norm import gated_rms_norm


class GatedNorm(nn.Module):
    """RMSNorm of each head, then a gate.

    Args:
        width: V, channels of a head; all heads share the weight (V,).
        eps: added to the mean square.
        gate: what makes a gate of its projection.
        affine: whether there is a weight.
    """

    def __init__(
        self, width: int, *, eps: float, gate: Literal["silu", "sigmoid"] = "silu", affine: bool = True
    ) -> None:
        super().__init__()
        self.width, self.eps, self.gate = width, eps, gate
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """(B, T, H V) from o (B, T, H, V) and the gate's projection (B, T, H V); without that there is no gate."""
        weight = o.new_ones(self.width) if self.weight is None else self.weight
        z = gate.unflatten(-1, o.shape[2:]) if gate is not None and self.gate == "silu" else None
        y = gated_rms_norm(o, z, weight, eps=self.eps, group_size=self.width, gate_first=False).flatten(2)
        return y * gate.sigmoid() if gate is not None and self.gate == "sigmoid" else y


def l2_norm(x: Tensor, *, eps: float = 1e-6, scale: float = 1.0) -> Tensor:
    """scale x / sqrt(eps + the sum of squares over the last axis), computed in float32 at least, in the dtype of x."""
    width = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    # The same as an RMSNorm whose weight is scale / sqrt(width): one pass.
    weight = torch.full((width,), scale * width**-0.5, device=x.device, dtype=wide)
    return gated_rms_norm(x, None, weight, eps=eps / width, group_size=width)
