"""One matrix product per target, over rows that a plan has sorted by target.

Torch's libraries do the products. What is here is the node around them: one for autograd and torch.compile, with
gradients that are written in place, and void rows that are 0. A plugin can give the nodes altx::grouped_mm and
altx::grouped_outer kernels of its own for a device (torch.library.register_kernel).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

ALIGNED = 16
"""Bytes of which torch's grouped product wants addresses and rows to be a multiple."""

FAST = (9, 10)
"""Major compute capabilities for which torch's grouped product is one kernel. For others it asks the GPU where the
groups end and is a loop."""


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows offsets[i]:offsets[i+1] of x times weight[i]; 0 in the other rows, whatever they hold.

    Args:
        x: (P, D).
        weight: (n, D, F), in the dtype of x.
        offsets: (n+1,) int64, rising from 0 to at most P.

    Returns:
        (P, F). Under autocast in its dtype, as of any product.
    """
    y: Tensor = _multiply(_cast(x), _cast(weight), offsets)
    return y


def grouped_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    """(silu(x gate_i) * x up_i) down_i for rows offsets[i]:offsets[i+1] of x; 0 in the other rows, whatever they hold.

    On a CPU one target after the other, so that what lies between its products is still in the cache.

    Args:
        x: (P, D).
        gate, up: (n, D, F).
        down: (n, F, D).
        offsets: as for `grouped_mm`.

    Returns:
        (P, D). Under autocast in its dtype.
    """
    if x.device.type != "cpu":
        return _composed(x, gate, up, down, offsets)
    arguments = [_cast(each) for each in (x, gate, up, down)]
    keep = torch.is_grad_enabled() and any(each.requires_grad for each in arguments)
    y: Tensor = _swiglu(*arguments, offsets, keep)[0]
    return y


def _composed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    hidden = F.silu(grouped_mm(x, gate, offsets)) * grouped_mm(x, up, offsets)
    return grouped_mm(hidden, down, offsets)


def _cast(x: Tensor) -> Tensor:
    """x in autocast's dtype, where that is on."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def one_kernel(*matrices: Tensor) -> bool:
    """Whether torch's own grouped product takes these and is one kernel, which does not ask the GPU for anything."""
    return all(
        each.is_cuda
        and each.dtype == torch.bfloat16
        and each.numel() > 0
        and torch.cuda.get_device_capability(each.device)[0] in FAST
        and each.data_ptr() % ALIGNED == 0
        and _aligned(each)
        for each in matrices
    )


def _aligned(matrices: Tensor) -> bool:
    """Whether matrices lie row by row or column by column, each of which begins at an aligned place."""
    rows, columns = matrices.shape[-2:]
    outer, inner = matrices.stride()[-2:]
    step = ALIGNED // matrices.itemsize
    return outer % step == 0 if inner == 1 and outer >= columns else outer == 1 and inner >= rows and inner % step == 0


def multiply(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """As `grouped_mm`, without gradients."""
    n, _, width = weight.shape
    x = x.contiguous()
    if one_kernel(x, weight) and width * x.itemsize % ALIGNED == 0:
        y = F.grouped_mm(x, weight, offs=offsets[1:].int())
        void = torch.arange(len(x), device=x.device) >= offsets[-1]
        return y.masked_fill_(void[:, None], 0)
    y, bounds = x.new_empty(len(x), width), offsets.tolist()
    for i in range(n):
        torch.mm(x[bounds[i] : bounds[i + 1]], weight[i], out=y[bounds[i] : bounds[i + 1]])
    y[bounds[n] :] = 0
    return y


def outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x_i^T y_i of the rows of each target: (n, D, F). Without gradients."""
    n = len(offsets) - 1
    x, y = x.contiguous(), y.contiguous()
    if one_kernel(x, y):
        return F.grouped_mm(x.T, y, offs=offsets[1:].int())
    out, bounds = x.new_empty(n, x.shape[1], y.shape[1]), offsets.tolist()
    for i in range(n):
        torch.mm(x[bounds[i] : bounds[i + 1]].T, y[bounds[i] : bounds[i + 1]], out=out[i])
    return out


_multiply = torch.library.custom_op("altx::grouped_mm", multiply, mutates_args=())
_outer = torch.library.custom_op("altx::grouped_outer", outer, mutates_args=())


@torch.library.custom_op("altx::grouped_swiglu", mutates_args=())
def _swiglu(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, offsets: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (P, D), and if asked to keep it what its gradients need, x gate and x up (P, F); else (0, F)."""
    y, bounds = torch.empty_like(x), offsets.tolist()
    most = _most(bounds)
    # Large memory is new to the process at every call, and then each page costs more than what is written there.
    g, u, hidden = (x.new_empty(len(x) if keep else most, gate.shape[2]) for _ in range(3))
    for i in range(len(gate)):
        own = slice(bounds[i], bounds[i + 1])
        here = own if keep else slice(own.stop - own.start)
        torch.mm(x[own], gate[i], out=g[here])
        torch.mm(x[own], up[i], out=u[here])
        active = torch.ops.aten.silu.out(g[here], out=hidden[: own.stop - own.start])
        torch.mm(active.mul_(u[here]), down[i], out=y[own])
    y[bounds[-1] :] = 0
    return (y, g, u) if keep else (y, g.new_empty(0, g.shape[1]), g.new_empty(0, g.shape[1]))


@torch.library.custom_op("altx::grouped_swiglu_backward", mutates_args=())
def _swiglu_gradients(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, offsets: Tensor, g: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, up and down."""
    dx, bounds = torch.empty_like(x), offsets.tolist()
    dgate, dup, ddown = (x.new_empty(weight.shape) for weight in (gate, up, down))
    scratch = x.new_empty(3, _most(bounds), g.shape[1])
    for i in range(len(gate)):
        own = slice(bounds[i], bounds[i + 1])
        active, dhidden, other = scratch[:, : own.stop - own.start]
        torch.ops.aten.silu.out(g[own], out=active)
        torch.mm(torch.mul(active, u[own], out=other).T, dy[own], out=ddown[i])
        torch.mm(dy[own], down[i].T, out=dhidden)
        du = active.mul_(dhidden)
        torch.mm(x[own].T, du, out=dup[i])
        torch.mm(du, up[i].T, out=dx[own])
        dg = torch.ops.aten.silu_backward.grad_input(dhidden.mul_(u[own]), g[own], grad_input=other)
        torch.mm(x[own].T, dg, out=dgate[i])
        dx[own].addmm_(dg, gate[i].T)
    dx[bounds[-1] :] = 0
    return dx, dgate, dup, ddown


def _most(bounds: list[int]) -> int:
    """Rows of the target that has most."""
    return max((stop - start for start, stop in pairwise(bounds)), default=0)


@_swiglu.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, offsets: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    g = x.new_empty(x.shape[0] if keep else 0, gate.shape[2])
    return torch.empty_like(x), g, torch.empty_like(g)


@_swiglu_gradients.register_fake
def _(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, offsets: Tensor, g: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate), torch.empty_like(up), torch.empty_like(down)


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


@register_flop_formula(torch.ops.altx.grouped_swiglu, get_raw=True)
def _swiglu_flops(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, offsets: Tensor, *_: object, **__: object) -> int:
    return 2 * _rows(x, offsets) * sum(weight.shape[1] * weight.shape[2] for weight in (gate, up, down))


@register_flop_formula(torch.ops.altx.grouped_swiglu_backward, get_raw=True)
def _swiglu_gradients_flops(dy: Tensor, *arguments: Tensor, **_: object) -> int:
    return 2 * _swiglu_flops(*arguments[:5])


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


def _save_swiglu(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.kept = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _swiglu_backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
    x, gate, up, down, offsets, g, u = ctx.saved_tensors
    if dy is None:
        return (None,) * 6
    if not torch.is_grad_enabled():
        if not ctx.kept:
            _, g, u = _swiglu(x, gate, up, down, offsets, True)
        return *_swiglu_gradients(dy, x, gate, up, down, offsets, g, u), None, None
    # Gradients of which there are gradients.
    y = _composed(x, gate, up, down, offsets)
    wanted = [each for each, needed in zip((x, gate, up, down), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None, None


_swiglu.register_autograd(_swiglu_backward, setup_context=_save_swiglu)
