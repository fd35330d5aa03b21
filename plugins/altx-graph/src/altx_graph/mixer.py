"""A graph convolution over tokens.

B rows, T tokens, K = reach of the edges, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output
from altx.masking import real_first
from altx.pieces import in_pieces
from altx.spec import BuildContext
from altx.state import State
from altx_graph import convs, slots
from altx_graph.config import GraphConfig
from altx_graph.edges import supplied
from altx_graph.token_graph import TokenGraph


class GraphMixer(Layer):
    """One of torch-geometric's layers, over a graph made from the sequence or over `ctx.graph`.

    Args:
        dim: D.
        conv: the layer.
        graph: how edges are made; None: only `ctx.graph` has any.
        edge_dim: numbers on each edge of `ctx.graph`, or None.
    """

    def __init__(self, dim: int, conv: nn.Module, graph: TokenGraph | None, edge_dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.edge_dim = edge_dim
        self.graph = graph
        self.conv = conv

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | None:
        if self.graph is None:
            return None
        weight = next(self.conv.parameters())
        return slots.empty(batch, self.graph.reach, self.dim, device or weight.device, dtype or weight.dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        refuse(self.graph, ctx, state)
        if not x.shape[1]:
            return Output(x, state)
        if ctx.graph is not None:
            x = x if ctx.mask is None else x.masked_fill(~ctx.mask[..., None], 0)
            edges = supplied(ctx.graph, x, ctx)
            edges = replace(edges, attr=convs.attributes(self.conv, edges.attr, self.edge_dim))
            return Output(convs.convolve(self.conv, slots.Slots(x, 0), edges))
        assert self.graph is not None
        if ctx.causal and (out := in_pieces(self, x, ctx, state)):
            return out
        batch = real_first(x, ctx)
        held, state = slots.gather(batch, state)
        y = convs.convolve(self.conv, held, self.graph.edges(held, ctx.causal))
        return Output(batch.restore(y), state)


def refuse(graph: TokenGraph | None, ctx: Context, state: State | None) -> None:
    """Say what a call lacks, or what does not go together."""
    if graph is None and ctx.graph is None:
        raise UnsupportedContext(
            "a graph mixer with graph supplied needs a ctx.graph",
            hint="give it altx.context.Graph(edge_index), or set graph to window, dilated or knn",
        )
    if state is not None and ctx.graph is not None:
        raise UnsupportedContext(
            "ctx.graph has edges between the tokens of one call, so it cannot continue a state",
            hint="leave the state out and give whole sequences, or leave the graph out and use that of the window",
        )
    if state is not None and not ctx.causal:
        raise UnsupportedContext(
            "a graph that looks both ways needs the whole sequence at once, so it cannot continue a state",
            hint="leave the state out, or use a causal context",
        )


def token_graph(config: GraphConfig, conv: nn.Module) -> TokenGraph | None:
    """The rule that a config describes."""
    if config.graph == "supplied":
        return None
    return TokenGraph(
        config.offsets,
        config.neighbours if config.graph == "knn" else None,
        loops=isinstance(conv, convs.LOOPS),
        degrees=isinstance(conv, convs.COUNTS),
    )


def build(config: GraphConfig, ctx: BuildContext) -> GraphMixer:
    conv = convs.make(config, ctx.dim)
    return GraphMixer(ctx.dim, conv, token_graph(config, conv), getattr(config, "edge_dim", None))
