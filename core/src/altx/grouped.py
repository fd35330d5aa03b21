"""One matrix product per target, over rows that a plan has sorted by target.

Torch's libraries do the products. What is here is the node around them: one for autograd and torch.compile, with
gradients that are written in place, and void rows that are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

ALIGNED = 16
"""Bytes of which torch's grouped product wants rows to be a multiple."""


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows offsets[i]:offsets[i+1] of x times weight[i]; 0 in the other rows, whatever they hold.

    Args:
        x: (P, D).
        weight: (n, D, F), in the dtype of x.
        offsets: (n+1,) int64, rising from 0 to at most P.

    Returns:
        (P, F). Under autocast in its dtype, as of any product.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    y: Tensor = _multiply(x, weight, offsets)
    return y


def _fast(x: Tensor, *widths: int) -> bool:
    """Whether torch's own grouped product runs, and so without asking the GPU where the groups end."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and len(x) > 0
        and all(width * x.itemsize % ALIGNED == 0 for width in widths)
    )


@torch.library.custom_op("altx::grouped_mm", mutates_args=())
def _multiply(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    n, _, width = weight.shape
    if _fast(x, *weight.shape[1:]):
        y = F.grouped_mm(x.contiguous(), weight, offs=offsets[1:].int())
        void = torch.arange(len(x), device=x.device) >= offsets[-1]
        return y.masked_fill_(void[:, None], 0)
    y, bounds = x.new_empty(len(x), width), offsets.tolist()
    for i in range(n):
        torch.mm(x[bounds[i] : bounds[i + 1]], weight[i], out=y[bounds[i] : bounds[i + 1]])
    y[bounds[n] :] = 0
    return y


@torch.library.custom_op("altx::grouped_outer", mutates_args=())
def _outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x_i^T y_i of the rows of each target: (n, D, F)."""
    n = len(offsets) - 1
    if _fast(x, x.shape[1], y.shape[1]):
        return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=offsets[1:].int())
    out, bounds = x.new_empty(n, x.shape[1], y.shape[1]), offsets.tolist()
    for i in range(n):
        torch.mm(x[bounds[i] : bounds[i + 1]].T, y[bounds[i] : bounds[i + 1]], out=out[i])
    return out


@_multiply.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@_outer.register_fake
def _(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], y.shape[1])


def _rows(x: Tensor, offsets: Tensor) -> int:
    """Rows that have a target, as far as can be seen."""
    return len(x) if offsets.is_meta else int(offsets[-1])


@register_flop_formula(torch.ops.altx.grouped_mm, get_raw=True)
def _multiply_flops(x: Tensor, weight: Tensor, offsets: Tensor, **_: object) -> int:
    return 2 * _rows(x, offsets) * weight.shape[1] * weight.shape[2]


@register_flop_formula(torch.ops.altx.grouped_outer, get_raw=True)
def _outer_flops(x: Tensor, y: Tensor, offsets: Tensor, **_: object) -> int:
    return 2 * _rows(x, offsets) * x.shape[1] * y.shape[1]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _multiply_backward(ctx, g):  # type: ignore[no-untyped-def]
    x, weight, offsets = ctx.saved_tensors
    dx = _multiply(g, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    dweight = _outer(x, g, offsets) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


def _outer_backward(ctx, g):  # type: ignore[no-untyped-def]
    x, y, offsets = ctx.saved_tensors
    return _multiply(y, g.transpose(1, 2), offsets), _multiply(x, g, offsets), None


_multiply.register_autograd(_multiply_backward, setup_context=_save)
_outer.register_autograd(_outer_backward, setup_context=_save)
