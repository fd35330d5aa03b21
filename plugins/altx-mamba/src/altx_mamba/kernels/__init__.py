"""The ops of this plugin: `selective-scan` and `causal-conv1d`."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import Backend, Op
from altx_mamba.kernels import conv, reference
from altx_mamba.kernels.selective_scan import OP

selective_scan = OP

causal_conv1d: Op[Tensor] = Op(
    "mamba-conv1d",
    reference=reference.causal_conv1d,
    backends=[Backend("torch", conv.causal_conv1d)],
)

__all__ = ["causal_conv1d", "selective_scan"]
