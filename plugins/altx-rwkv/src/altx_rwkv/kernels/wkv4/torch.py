"""WKV of RWKV-4 in PyTorch: what runs anywhere without a compiled kernel.

The recurrence of the reference with its own backward pass: autograd would keep a dozen tensors of every token, and walk
back through as many functions. The log weights, which do not depend on the values, go through time first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast
from altx_kernels.packing import one_by_one
from altx_rwkv.kernels.wkv4.reference import EMPTY, start


def wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None = None, reset: Tensor | None = None,
    lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `wkv4.wkv4`."""
    if cu_seqlens is not None:
        return one_by_one(wkv4, cu_seqlens, {"k": k, "v": v, "reset": reset}, initial_state, w=w, u=u)
    dtype = precise(w, u, k, v, initial_state)
    with no_autocast(k.device):
        mean, weight = start(k, initial_state, dtype)
        values = (x.to(dtype) for x in (w, u, k, v))
        y, mean, weight = _WKV4.apply(*values, mean, weight, reset, lengths)  # type: ignore[no-untyped-call]
    return y.to(v.dtype), torch.stack([mean, weight], 1)


class _WKV4(torch.autograd.Function):
    """Time comes first inside: a token's row is then contiguous."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, u: Tensor, k: Tensor, v: Tensor, mean: Tensor, weight: Tensor, reset: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        fresh = None if reset is None else reset.T[..., None]
        held = None
        if lengths is not None:
            held = torch.arange(len(k), device=k.device)[:, None, None] >= lengths[:, None]
            fresh = None if fresh is None else fresh & ~held
            k, v = k.masked_fill(held, 0), v.masked_fill(held, 0)
        weights, means = torch.empty_like(k), torch.empty_like(k)  # before each token
        for t in range(len(k)):
            if fresh is not None:
                weight = weight.masked_fill(fresh[t], EMPTY)
            weights[t] = weight
            after = torch.logaddexp(weight + w, k[t])
            weight = after if held is None else after.where(~held[t], weight)
        now, next_ = torch.sigmoid(k + u - weights), torch.sigmoid(k - (weights + w))
        if held is not None:
            now, next_ = now.masked_fill(held, 0), next_.masked_fill(held, 0)
        for t in range(len(k)):
            if fresh is not None:
                mean = mean.masked_fill(fresh[t], 0)
            means[t] = mean
            mean = torch.lerp(mean, v[t], next_[t])
        ctx.save_for_backward(v - means, now, next_, fresh, held)
        y = torch.addcmul(means, now, v - means)
        if held is not None:
            y = y.masked_fill(held, 0)
        y = y.transpose(0, 1)
        return y, mean.clone(), weight.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dmean: Tensor, dweight: Tensor) -> tuple[Tensor | None, ...]:
        change, now, next_, fresh, held = ctx.saved_tensors
        dy = dy.transpose(0, 1)
        if held is not None:
            dy = dy.masked_fill(held, 0)
        of_now, kept = dy * change * now * (1 - now), 1 - next_
        to_mean, slope = dy * (1 - now), change * next_ * kept
        dmeans, dweights = torch.empty_like(change), torch.empty_like(change)  # after each token
        for t in reversed(range(len(change))):
            dmeans[t], dweights[t] = dmean, dweight
            # A held token leaves its weight as it is, and next_ is 0 there.
            past = torch.addcmul(-slope[t] * dmean, kept[t], dweight)
            dmean, dweight = torch.addcmul(to_mean[t], kept[t], dmean), past - of_now[t]
            if fresh is not None:
                dmean, dweight = dmean.masked_fill(fresh[t], 0), dweight.masked_fill(fresh[t], 0)
        of_next = dmeans * slope
        dw = dweights * kept - of_next
        if held is not None:
            dw = dw.masked_fill(held, 0)
        dk, dv = of_now + of_next + dweights * next_, dy * now + dmeans * next_
        return (
            dw.sum((0, 1)), of_now.sum((0, 1)), dk.transpose(0, 1), dv.transpose(0, 1), dmean, dweight, None, None,
        )  # fmt: skip
