"""The gated RMS norm in plain PyTorch: the oracle of every backend."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from altx_kernels.arguments import precise


def gated_rms_norm(
    y: Tensor, z: Tensor | None, weight: Tensor, *, eps: float, group_size: int, gate_first: bool
) -> Tensor:
    """norm(y silu(z)), or norm(y) silu(z); see `altx_kernels.gated_rms_norm.gated_rms_norm`."""
    dtype = precise(y, z, weight)
    out, gate = y.to(dtype), None if z is None else F.silu(z.to(dtype))
    if gate is not None and gate_first:
        out = out * gate
    groups = out.unflatten(-1, (y.shape[-1] // group_size, group_size))
    out = F.rms_norm(groups, (group_size,), eps=eps).flatten(-2) * weight.to(dtype)
    if gate is not None and not gate_first:
        out = out * gate
    return out.to(y.dtype)
