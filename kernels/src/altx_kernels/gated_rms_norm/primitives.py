"""The gated RMS norm and its gradient as torch sees them, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from altx_kernels.primitive import Primitive


def fake_backward(
    g: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, gate_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of y, z (empty if there is none) and weight."""
    dz = y.new_empty(0) if z is None else z.new_empty(z.shape)
    return y.new_empty(y.shape), dz, weight.new_empty(weight.shape)


def _fake(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, gate_first: bool) -> Tensor:
    return y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.group_size, ctx.gate_first = inputs
    ctx.save_for_backward(*tensors)


def primitives(
    name: str, forward: Callable[..., Tensor], backward: Callable[..., Any], device: str
) -> tuple[Primitive, Primitive]:
    """The norm, registered as altx::NAME, and its gradient.

    Args:
        name: of the first; that of the second ends in _backward.
        forward: makes the output of y, z, weight, eps, group_size and gate_first.
        backward: makes what `fake_backward` makes room for, of the output's gradient and the same.
        device: as for `Primitive`.
    """
    gradient = Primitive(f"altx::{name}_backward", backward, fake_backward, device=device)

    def differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        dy, dz, dweight = gradient(g, y, z, weight, ctx.eps, ctx.group_size, ctx.gate_first)
        return dy, None if z is None else dz, dweight, None, None, None

    norm = Primitive(f"altx::{name}", forward, _fake, save=_save, backward=differentiate, device=device)
    return norm, gradient
