"""The WKV operator of RWKV-4, one token at a time, in any dtype: the oracle of every backend.

Paper: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, equation 16:

    wkv_t = (sum_{i<t} exp(k_i + (t - 1 - i) w) v_i + exp(k_t + u) v_t) / (the same without v)

    code            paper                                   shape
    w, u            -w and u                                (D,)
    k, v            k, v                                    (B, T, D)
    mean            the quotient of both sums over i < t    (B, D)
    weight          the logarithm of the lower sum          (B, D)

The paper's recurrence (appendix D) carries both sums, and a maximum that they are scaled by. Their quotient and one
logarithm say the same with one number less, and are differentiable.

B rows, T tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_kernels.arguments import precise
from altx_kernels.packing import one_by_one

EMPTY = -1e38
"""Log weight of no token at all: finite, and exp of it is 0 next to any key."""


def wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None = None, reset: Tensor | None = None,
    lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `wkv4.wkv4`."""
    if cu_seqlens is not None:
        return one_by_one(wkv4, cu_seqlens, {"k": k, "v": v, "reset": reset}, initial_state, w=w, u=u)
    dtype, out = precise(w, u, k, v, initial_state), v.dtype
    w, u, k, v = (x.to(dtype) for x in (w, u, k, v))
    mean, weight = start(k, initial_state, dtype)
    if reset is not None and lengths is not None:
        reset = reset & (torch.arange(k.shape[1], device=k.device) < lengths[:, None])
    ys = []
    for t in range(k.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        if reset is not None:
            mean, weight = mean.where(~reset[:, t, None], 0), weight.where(~reset[:, t, None], EMPTY)
        y = mean + torch.sigmoid(k_t + u - weight) * (v_t - mean)
        decayed = weight + w
        # log(exp(decayed) + exp(k)), written so that it has second derivatives next to EMPTY, too.
        new = mean + torch.sigmoid(k_t - decayed) * (v_t - mean), k_t + F.softplus(decayed - k_t, threshold=40)
        if lengths is not None:
            real = (t < lengths)[:, None]
            y, new = y.where(real, 0), (new[0].where(real, mean), new[1].where(real, weight))
        mean, weight = new
        ys.append(y)
    y = torch.stack(ys, 1).to(out) if ys else v.to(out)
    return y, torch.stack([mean, weight], 1)


def start(k: Tensor, initial_state: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and log weight before the first token of k (B, T, D), each (B, D)."""
    if initial_state is not None:
        mean, weight = initial_state.to(dtype).unbind(1)
        return mean, weight
    mean = k.new_zeros(k.shape[0], k.shape[2], dtype=dtype)
    return mean, mean + EMPTY
