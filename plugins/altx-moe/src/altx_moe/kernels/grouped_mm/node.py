"""A grouped product and its gradients, which are grouped products too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from altx_kernels.primitive import Primitive


def node(name: str, forward: Callable[[Tensor, Tensor, Tensor], Tensor], device: str) -> Primitive:
    """As the reference, one node for autograd and torch.compile.

    Args:
        name: "namespace::name".
        forward: the product, of both kinds.
        device: torch.library's name of the devices it runs on.
    """

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, other, offsets = ctx.saved_tensors
        rows, matrices = (g, other) if other.dim() == 3 else (other, g)
        dx = product(rows, matrices.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
        return dx, product(x, g, offsets) if ctx.needs_input_grad[1] else None, None

    product = Primitive(name, forward, fake, save=save, backward=backward, device=device)
    return product


def fake(x: Tensor, other: Tensor, offsets: Tensor) -> Tensor:
    """An empty tensor of the result's shape."""
    if other.dim() == 3:
        return x.new_empty(x.shape[0], other.shape[2])
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], other.shape[1])


def save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Keep what the gradients need."""
    ctx.save_for_backward(*inputs)
