"""The ops of this plugin: `selective-scan` and `causal-conv1d`."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import Backend, Op
from altx_mamba.kernels import chunked, conv, reference

selective_scan: Op[tuple[Tensor, Tensor]] = Op(
    "selective-scan",
    reference=reference.selective_scan,
    backends=[Backend("torch", chunked.selective_scan)],
)

causal_conv1d: Op[Tensor] = Op(
    "mamba-conv1d",
    reference=reference.causal_conv1d,
    backends=[Backend("torch", conv.causal_conv1d)],
)

__all__ = ["causal_conv1d", "selective_scan"]
