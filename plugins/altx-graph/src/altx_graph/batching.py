"""Graphs batched by torch-geometric as rows of tokens, and back.

N nodes of B graphs, M nodes of the largest, D numbers on each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altx.context import Context, Graph
from altx.errors import UnsupportedContext


def to_tokens(batch: Any, rows: int | None = None, length: int | None = None) -> tuple[Tensor, Context]:
    """The nodes of a `torch_geometric.data.Batch` (or of one `Data`) as one row of tokens for each graph.

    Args:
        batch: `x` (N, D), `edge_index` (2, E), `edge_attr` (E, F) or None, and `batch` (N,) graph of each node, in
            ascending order, or None for one graph.
        rows: B or more, for batches that all have one shape; default: B.
        length: M or more; default: M.

    Returns:
        x (rows, length, D), 0 behind each graph's last node, and its context: both ways, with mask and graph.

    Raises:
        UnsupportedContext: if `rows` or `length` are too few, or nodes of a graph are not next to each other.
    """
    x, index = batch.x, batch.edge_index
    if x is None or index is None:
        raise UnsupportedContext("the batch has no x or no edge_index; graphs without features need an encoding as x")
    x = x[:, None] if x.dim() == 1 else x
    row = getattr(batch, "batch", None)
    row = torch.zeros(len(x), dtype=torch.int64, device=x.device) if row is None else row
    if bool((row.diff() < 0).any()):
        raise UnsupportedContext("the nodes of each graph must be next to each other: batch.batch does not ascend")
    graphs: int = getattr(batch, "num_graphs", 1) if rows is None else rows
    count = row.bincount(minlength=graphs)
    rows = len(count) if rows is None else rows
    longest = int(count.max()) if len(count) else 0
    length = longest if length is None else length
    if len(count) > rows or longest > length:
        raise UnsupportedContext(
            f"{len(count)} graphs of up to {longest} nodes do not fit into {rows} rows of {length} tokens"
        )
    first = count.cumsum(0) - count
    token = row * length + torch.arange(len(x), device=x.device) - first[row]
    tokens = x.new_zeros(rows * length, x.shape[1]).index_copy(0, token, x)
    mask = torch.zeros(rows * length, dtype=torch.bool, device=x.device).index_fill(0, token, True)
    graph = Graph(token[index], getattr(batch, "edge_attr", None))
    return tokens.view(rows, length, -1), Context(causal=False, mask=mask.view(rows, length), graph=graph)


def to_nodes(y: Tensor, ctx: Context) -> Tensor:
    """The tokens of y (B, M, D) that are nodes, in the order of the batch: (N, D)."""
    return y.flatten(0, 1) if ctx.mask is None else y[ctx.mask]
