"""Everything about the tokens that is not the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from altx.errors import UnsupportedContext, shown

if TYPE_CHECKING:
    from altx.layer import Layer
    from altx.memory import Attended


@dataclass(frozen=True)
class Graph:
    """Edges between tokens.

    Args:
        edge_index: (2, E) int64, source to target, over the B*T flattened tokens.
        edge_attr: (E, F) or None.
    """

    edge_index: Tensor
    edge_attr: Tensor | None = None


@dataclass(frozen=True)
class Cross:
    """A second sequence to attend to.

    Args:
        tokens: (B, S, D); or (B, T, S, D), S for each token of x (B, T, D) alone, as a memory's attachment gives them.
        mask: (B, S) bool, True where real, or None; there is none for each token's own.
    """

    tokens: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class SharedKV:
    """Keys and values of a stack's first application, which its later ones look up instead of making their own.

    Args:
        kept: what each layer that `shares_kv` has kept: it puts it there itself, and later reads it.
        own: (B, T) int64, which of its row's real tokens of the first application each token is; None in that one.
    """

    kept: dict[Layer, Any]
    own: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """What a layer is told beside its input x (B, T, D). Every field but `causal` may be None or empty.

    Args:
        causal: no output may depend on a later token.
        mask: (B, T) bool, True for a real token, in any pattern. A masked token leaves the state
            untouched, is never routed and never counts in a statistic; its output is unspecified.
        positions: (B, T) int64 absolute positions; the default counts real tokens from `state.seen`.
        cu_seqlens: (N+1,) int64: x is (1, T, D) and holds N sequences end to end, which start at
            cu_seqlens[:-1]; a state then has batch N. No layer need check it: a model does, see `sequences`.
        reset: (B, T) bool, True where a fresh sequence starts within a row; at a masked token it means nothing.
            `seen`, `ranks` and default positions count on across it.
        graph: edges between the tokens.
        cross: a second sequence.
        grid: (height, width) when the tokens are the cells of a grid, row by row.
        shared: exports of earlier layers by name.
        generator: source of every random number a layer draws.
        recall: what a layer that `accepts_kv` asks, once per call, for more keys and values: `recall(q, k, v, ctx)`
            with its queries (B, T, H, Dk), already scaled and with no position in them, keys (B, T, G, Dk) and values
            (B, T, G, Dv), and the context of the tokens in their order, gives an `altx.memory.Attended` to join.
        shared_kv: for a layer that `shares_kv` and is applied several times; no state is given but in the first.
        donate_state: the caller gives up the state that it passes in, and has reserved room in it for
            these tokens: its storage may be reused. Only a generation loop can know this.
    """

    causal: bool = True
    mask: Tensor | None = None
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reset: Tensor | None = None
    graph: Graph | None = None
    cross: Cross | None = None
    grid: tuple[int, int] | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None
    recall: Callable[[Tensor, Tensor, Tensor, Context], Attended] | None = None
    shared_kv: SharedKV | None = None
    donate_state: bool = False

    def replace(self, **changes: Any) -> Context:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def slice(self, start: int, stop: int) -> Context:
        """The context of tokens start..stop-1 of each row. `shared` must hold one entry per token."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[:, start:stop]

        return replace(
            self,
            mask=cut(self.mask),
            positions=cut(self.positions),
            reset=cut(self.reset),
            shared={name: value[:, start:stop] for name, value in self.shared.items()},
        )

    def and_mask(self, mask: Tensor) -> Context:
        """A context in which only tokens of both masks are real. mask: (B, T) bool."""
        return replace(self, mask=mask if self.mask is None else self.mask & mask)

    def sequences(self, x: Tensor) -> int:
        """Number of sequences in x (B, T, ...): its rows, or what `cu_seqlens` cuts its one row into.

        A model asks once per call, for all its layers. A compiled graph and an accelerator only assert what the bounds
        are, when they get there: nobody waits for values.

        Raises:
            UnsupportedContext: if `cu_seqlens` does not cut x into sequences.
        """
        cu = self.cu_seqlens
        if cu is None:
            return x.shape[0]
        if cu.dim() != 1 or cu.dtype != torch.int64 or not len(cu):
            raise UnsupportedContext(
                f"ctx.cu_seqlens must be (N+1,) int64; it is {tuple(cu.shape)} {cu.dtype}",
                hint="pass the bounds of N sequences that lie end to end, such as torch.tensor([0, 5, 12])",
            )
        if x.shape[0] != 1:
            raise UnsupportedContext(
                f"a packed batch has one row, not {x.shape[0]}",
                hint="lay the sequences end to end, or pass no cu_seqlens",
            )
        right = (cu[0] == 0) & (cu[-1] == x.shape[1]) & (cu.diff() >= 0).all()
        wanted = f"ctx.cu_seqlens must rise from 0 to the {x.shape[1]} tokens there are"
        if cu.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(right, wanted)
        elif not right:
            raise UnsupportedContext(f"{wanted}; it is {shown(cu.tolist())}")
        return len(cu) - 1

    def lengths(self, x: Tensor) -> Tensor:
        """Number of real tokens in each row of x (B, T, ...): (B,) int64."""
        if self.mask is None:
            return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
        return self.mask.sum(1)

    def ranks(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Index of each token of x (B, T, ...) among its row's real tokens, counted from `seen`: (B, T) int64.

        A masked token gets the index of the real token before it.
        """
        if self.mask is None:
            ranks = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        else:
            ranks = self.mask.cumsum(1) - 1
        return ranks if seen is None else ranks + seen[:, None]

    def share_of(self, whole: Context, piece: Tensor, x: Tensor) -> Tensor:
        """What part of the real tokens of x, with context `whole`, this context's `piece` of it holds: a scalar."""
        return self.lengths(piece).sum() / whole.lengths(x).sum().clamp(min=1)
