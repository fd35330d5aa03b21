"""torch-geometric's layers, built from a config and applied to tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.errors import UnsupportedContext
from altx_graph import pyg
from altx_graph.config import GATConfig, GCNConfig, GINConfig, GraphConfig, GraphSAGEConfig, GraphTransformerConfig
from altx_graph.edges import Edges
from altx_graph.slots import Slots

LOOPS = (pyg.GCNConv, pyg.GATv2Conv)
"""Layers in which a token is one of its own neighbours; the others give it a weight of its own."""

COUNTS = (pyg.GCNConv,)
"""Layers that weigh an edge by the number of edges at its ends."""


def make(config: GraphConfig, dim: int) -> nn.Module:
    """The layer that a config describes, with torch-geometric's own initialisation."""
    conv: nn.Module
    # Neither norm nor self-loops are left to it: it sees the tokens of a call, and an edge may come from before.
    if isinstance(config, GCNConfig):
        conv = pyg.GCNConv(dim, dim, normalize=False, bias=config.bias)
    elif isinstance(config, GATConfig):
        conv = pyg.GATv2Conv(
            dim, dim // config.heads, config.heads,
            negative_slope=config.negative_slope, add_self_loops=False, edge_dim=config.edge_dim,
            bias=config.bias, share_weights=config.share_weights,
        )  # fmt: skip
    elif isinstance(config, GraphSAGEConfig):
        conv = pyg.SAGEConv(
            dim, dim, config.aggregate, normalize=config.normalise, project=config.project, bias=config.bias
        )
    elif isinstance(config, GINConfig):
        hidden = config.hidden or dim
        perceptron = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        kind = pyg.GINConv if config.edge_dim is None else partial(pyg.GINEConv, edge_dim=config.edge_dim)
        conv = kind(perceptron, eps=config.eps, train_eps=config.train_eps)
    else:
        assert isinstance(config, GraphTransformerConfig)
        conv = pyg.TransformerConv(
            dim, dim // config.heads, config.heads, beta=config.beta, edge_dim=config.edge_dim, bias=config.bias
        )
    return conv


def convolve(conv: nn.Module, slots: Slots, edges: Edges) -> Tensor:
    """The layer's outputs (B, T, D) for the tokens of the call."""
    x_BSD, kept = slots.x, slots.kept
    rows, size, dim = x_BSD.shape
    length = size - kept
    nodes = rows * length
    if x_BSD.device.type == "cpu" and not torch.compiler.is_compiling():
        edges, spare = edges.present(nodes), 0
    else:
        # Leaving edges out would wait for the device; one token more takes them in.
        spare = 1
    y: Tensor
    if isinstance(conv, pyg.GCNConv):
        # It has one list of tokens for sources and targets.
        target = edges.target + (edges.target // length + 1) * kept if kept else edges.target
        index = torch.stack([edges.source, target.clamp(max=rows * size)])
        x = _padded(x_BSD, spare)
        index, weight = _normalised(index, edges, len(x), x.dtype)
        matrix = _matrix(conv, index, weight, len(x), len(x)) if edges.made and not spare else None
        y = (conv(x, index, weight) if matrix is None else conv(x, matrix))[: rows * size]
        return y.view(rows, size, dim)[:, kept:]
    index, attr = torch.stack([edges.source, edges.target]), edges.attr
    x = _padded(x_BSD[:, kept:], spare)
    if isinstance(conv, pyg.GATv2Conv) and not edges.made:
        index, attr = pyg.remove_self_loops(index, attr)
        index, attr = pyg.add_self_loops(index, attr, fill_value=conv.fill_value, num_nodes=len(x))
    ends = (x_BSD.reshape(-1, dim), x) if kept else x
    matrix = _matrix(conv, index, x.new_ones(index.shape[1]), len(x), rows * size) if edges.made and not spare else None
    if matrix is not None:
        y = conv(ends, matrix)
    else:
        y = conv(ends, index, **({} if attr is None else {"edge_attr": attr}))[:nodes]
    return y.view(rows, length, dim)


def _padded(x: Tensor, spare: int) -> Tensor:
    """x (B, T, D) as (B * T + spare, D)."""
    x = x.reshape(-1, x.shape[-1])
    return F.pad(x, (0, 0, 0, spare)) if spare else x


def _matrix(conv: nn.Module, index: Tensor, weight: Tensor, targets: int, sources: int) -> Tensor | None:
    """The edges as a sparse matrix, with which torch-geometric keeps no vector for every edge; None where it cannot.

    Args:
        index: (2, E) on a CPU, sorted by target, then source.
        weight: (E,).
    """
    sums = isinstance(conv, pyg.GCNConv | pyg.SAGEConv | pyg.GINConv) and conv.aggr in ("add", "sum", "mean")
    wide = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if not (sums and wide and torch.backends.mkl.is_available()):
        return None
    rows = F.pad(index[1].bincount(minlength=targets).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(rows, index[0], weight, (targets, sources))


def _normalised(index: Tensor, edges: Edges, nodes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Edges with the weights of GCN: 1 / sqrt(d_source d_target), d the number of edges into a token.

    A source's degree counts edges into it, all from its past if the graph is causal: no later token changes it.
    """
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if edges.degree is None:
        given = None if edges.attr is None else edges.attr.flatten().to(wide)
        index, weight = pyg.gcn_norm(index, given, nodes, dtype=wide)
        return index, weight.to(dtype)
    scale = F.pad(edges.degree.flatten(), (0, 1), value=1).to(wide).rsqrt()
    return index, (scale[index[0]] * scale[index[1]]).to(dtype)


def attributes(conv: nn.Module, attr: Tensor | None, width: int | None) -> Tensor | None:
    """The attributes of supplied edges as a layer built for (E, width) of them takes them, or with None for none.

    Raises:
        UnsupportedContext: if they are not those.
    """
    # GCN weighs an edge by a number and needs no parameter for that.
    if attr is None and (width is None or isinstance(conv, pyg.GCNConv)):
        return None
    if isinstance(conv, pyg.GCNConv):
        width = 1
    if attr is None:
        raise UnsupportedContext(f"ctx.graph has no edge_attr, and the layer was built with edge_dim {width}")
    attr = attr[:, None] if attr.dim() == 1 else attr
    if width == attr.shape[1]:
        return attr
    found = f"ctx.graph.edge_attr has {attr.shape[1]} numbers for each edge"
    if width is None:
        can = "graph supplied and edge_dim" if hasattr(conv, "edge_dim") or isinstance(conv, pyg.GINConv) else ""
        raise UnsupportedContext(
            f"{found}, and the layer takes none", hint=f"set {can}, or leave edge_attr out" if can else "leave them out"
        )
    raise UnsupportedContext(f"{found}, and the layer takes {width}")
