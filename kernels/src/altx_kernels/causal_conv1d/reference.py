"""The short causal convolution token by token: the oracle of every backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_kernels.arguments import precise
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
    """y_t = bias + sum_j weight_j x_{t-K+1+j}; see `altx_kernels.causal_conv1d.causal_conv1d`."""
    if cu_seqlens is not None:
        return one_by_one(
            causal_conv1d, cu_seqlens, {"x": x, "reset": reset}, initial_state,
            weight=weight, bias=bias, activation=activation,
        )  # fmt: skip
    batch, tokens, dim = x.shape
    dtype = precise(x, weight, bias, initial_state)
    # Once and not per token: so gradients are summed in that dtype too.
    taps, offset = weight.T.to(dtype), None if bias is None else bias.to(dtype)
    keep = len(taps) - 1
    if initial_state is None:
        initial_state = x.new_zeros(batch, keep, dim)
    state = past = initial_state.to(dtype)
    ys = []
    for t in range(tokens):
        if reset is not None:
            past = torch.where(reset[:, t, None, None], 0, past)
        window = torch.cat([past, x[:, t, None].to(dtype)], 1)
        y = (window * taps).sum(1)
        y = y if offset is None else y + offset
        ys.append(F.silu(y) if activation else y)
        past = window[:, 1:]
        state = past if lengths is None else torch.where((t < lengths)[:, None, None], past, state)
    y = torch.stack(ys, 1).to(x.dtype) if ys else x.clone()
    return y, state.to(initial_state.dtype, copy=True)
