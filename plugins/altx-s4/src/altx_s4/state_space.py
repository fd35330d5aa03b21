"""What the layers of this package share: a linear state space along the sequence, then a pointwise output.

B rows, T tokens, D model width, N complex states.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output, advanced
from altx.layout import reverse
from altx.masking import RealFirst, real_first
from altx.pieces import in_pieces
from altx.state import Leaf, State
from altx_s4.kernels.diagonal_ssm import diagonal_ssm

LEAVES = {"ssm": Leaf(fp32=True)}


def wide(parameter: Tensor) -> Tensor:
    """A parameter in the dtype in which state spaces are computed: float32 at least."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def initial_log_dt(shape: tuple[int, ...], dt_min: float, dt_max: float) -> Tensor:
    """Logarithms of step sizes that are log-uniform between dt_min and dt_max."""
    return torch.empty(shape).uniform_(math.log(dt_min), math.log(dt_max))


class StateSpace(Layer):
    """A layer whose state is that of a state space.

    Args:
        state_shape: (channels, 2, N) of one row's state.
        bidirectional: whether each token sees all others, through a second system that runs from the end.
    """

    def __init__(self, state_shape: tuple[int, int, int], bidirectional: bool) -> None:
        super().__init__()
        self.state_shape = state_shape
        self.bidirectional = bidirectional

    @abstractmethod
    def sequence(self, batch: RealFirst, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """y (B, T, D) of the state space and the last state, from the tokens and the state before them."""

    @abstractmethod
    def output(self, y: Tensor) -> Tensor:
        """What is done to each token afterwards."""

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | None:
        if self.bidirectional:
            return None
        return State.zeros(batch, {"ssm": self.state_shape}, LEAVES, next(self.parameters()), device, dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if self.bidirectional:
            self._refuse(ctx)
            state = None
        if not x.shape[1]:
            return Output(x, state)
        if not self.bidirectional and (out := in_pieces(self, x, ctx, state)):
            return out
        batch = real_first(x, ctx)
        y, h = self.sequence(batch, state["ssm"] if state else None)
        y = batch.restore(self.output(y))
        if state is not None:
            state = state.replace(ssm=h, seen=advanced(state.seen, x, ctx))
        return Output(y, state)

    def _refuse(self, ctx: Context) -> None:
        if ctx.causal:
            raise UnsupportedContext(
                "a bidirectional state space lets each token see those after it, so it cannot be causal",
                hint="use a model that is not causal, or set bidirectional: false",
            )
        if ctx.reset is not None:
            raise UnsupportedContext(
                "a bidirectional state space takes no resets within a row",
                hint="put each sequence into a row of its own",
            )


class System(NamedTuple):
    """Coefficients of a discrete state space, arguments of `diagonal_ssm` in order."""

    rate: Tensor
    c: Tensor
    b: Tensor | None = None
    w: Tensor | None = None
    v: Tensor | None = None


def backwards(batch: RealFirst, x: Tensor, system: System) -> Tensor:
    """`diagonal_ssm` over each row's real tokens from the last to the first: y like x, zero where none is real."""
    y = diagonal_ssm(reverse(x, batch.mask), *system, lengths=batch.lengths)[0]
    return reverse(y, batch.mask)


def both_ways(batch: RealFirst, state: Tensor | None, systems: list[System], D: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel through its state space, and through a second one that sees what comes after the token.

    Args:
        batch: the tokens.
        state: (B, D, 2, N) before them, or None.
        systems: one or two.
        D: (D,), the skip.

    Returns:
        y (B, T, D) and the first system's last state.
    """
    y, h = diagonal_ssm(batch.x, *systems[0], D=D, initial_state=state, reset=batch.reset, lengths=batch.lengths)
    if len(systems) > 1:
        # As in the authors' code, it sees what comes after the token, and not the token itself.
        y = y + F.pad(backwards(batch, batch.x, systems[1])[:, 1:], (0, 0, 0, 1))
    return y, h


class GLU(nn.Sequential):
    """[a | b] = W y + b, a * sigmoid(b): parameters `0.weight` and `0.bias`, as in the authors' code."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 2 * dim), nn.GLU(dim=-1))
