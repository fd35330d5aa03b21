"""What the backward passes of the compiled backends have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from altx_kernels.primitive import Primitive


def backward_fake(
    dy: Tensor, x: Tensor, mix: Tensor, initial_state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of x, mix and the initial state, there or not."""
    like = x if initial_state is None else initial_state
    return x.new_empty(x.shape), mix.new_empty(mix.shape), like.new_empty(x.shape[0], x.shape[2])


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the arguments, which are all that a backward pass needs."""
    ctx.save_for_backward(*inputs)


def through(backward: Primitive) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradients of all arguments by a backend's backward pass."""

    def differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mix, initial_state, reset = ctx.saved_tensors
        dx, dmix, dinitial = backward(dy, x, mix, initial_state, reset)
        return dx, dmix, None if initial_state is None else dinitial, None

    return differentiate
