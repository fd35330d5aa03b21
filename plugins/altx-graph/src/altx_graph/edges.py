"""Edges between tokens, as torch-geometric's layers want them, and those that a user supplies.

B rows, T tokens of a call, K tokens kept from before it, S = K + T slots, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altx.context import Context, Graph
from altx.errors import UnsupportedContext


@dataclass(frozen=True)
class Edges:
    """Edges into the tokens of a call.

    An edge that is not there (its source would be of another document, or masked) stays in the list and points to
    one token more, whose output is thrown away: so their number depends on no value.

    Args:
        source: (E,) int64 into the B * S slots.
        target: (E,) int64 into the B * T tokens, B * T for an edge that is not there.
        attr: (E, F) or None.
        made: from the sequence: sorted by target, then source, and from each token to itself where the layer wants it.
        degree: (B, S) number of edges into each slot's token and 1 for itself, or None if nobody counted.
    """

    source: Tensor
    target: Tensor
    attr: Tensor | None = None
    made: bool = False
    degree: Tensor | None = None

    def present(self, nodes: int) -> Edges:
        """Only the edges that are there. nodes: B * T."""
        there = self.target < nodes
        attr = None if self.attr is None else self.attr[there]
        return replace(self, source=self.source[there], target=self.target[there], attr=attr)


def supplied(graph: Graph, x: Tensor, ctx: Context) -> Edges:
    """The edges of ctx.graph over the tokens of x (B, T, D), but those of masked tokens.

    Raises:
        UnsupportedContext: for an edge that leaves the tokens, its row or its document, or that comes from the future
            in a causal context; it is named.
    """
    batch, length = x.shape[:2]
    _check_shapes(graph)
    source, target = graph.edge_index
    _check_edges(source, target, batch, length, ctx)
    if ctx.mask is not None:
        real = ctx.mask.flatten()
        target = target.where(real[source] & real[target], batch * length)
    return Edges(source, target, graph.edge_attr)


def _check_shapes(graph: Graph) -> None:
    index, attr = graph.edge_index, graph.edge_attr
    if index.dim() != 2 or index.shape[0] != 2 or index.dtype != torch.int64:
        found = f"{tuple(index.shape)} {str(index.dtype).removeprefix('torch.')}"
        raise UnsupportedContext(f"ctx.graph.edge_index must be (2, E) int64, source to target; it is {found}")
    if attr is not None and (attr.dim() not in (1, 2) or len(attr) != index.shape[1]):
        raise UnsupportedContext(
            f"ctx.graph.edge_attr must have a row for each of the {index.shape[1]} edges; it is {tuple(attr.shape)}"
        )


def _check_edges(source: Tensor, target: Tensor, batch: int, length: int, ctx: Context) -> None:
    count = batch * length
    outside = (source < 0) | (source >= count) | (target < 0) | (target >= count)
    leaves_row = source // length != target // length
    ahead = source > target if ctx.causal else torch.zeros_like(outside)
    bad = outside | leaves_row | ahead
    crosses = torch.zeros_like(outside)
    if ctx.reset is not None:
        first = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
        document = first.cumsum(1).flatten()
        crosses = document[source.clamp(0, count - 1)] != document[target.clamp(0, count - 1)]
        bad = bad | crosses
    if not bool(bad.any()):
        return
    edge = int(bad.nonzero()[0, 0])
    a, b = int(source[edge]), int(target[edge])
    hint = "leave such edges out"
    if bool(outside[edge]):
        why = f"leaves the {batch} x {length} = {count} tokens"
        hint = f"tokens are numbered row * {length} + place, from 0 to {count - 1}"
    elif bool(leaves_row[edge]):
        why = f"leads from row {a // length} to row {b // length}"
    elif bool(ahead[edge]):
        why = "comes from the future in a causal model"
        hint += ", or make the model an encoder (causal: false)"
    else:
        why = "crosses a ctx.reset into another document"
    raise UnsupportedContext(f"edge {edge} of ctx.graph, {a} -> {b}, {why}", hint=hint)
