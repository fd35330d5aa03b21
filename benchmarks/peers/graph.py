"""altx-graph beside torch-geometric's own layers, with the same weights on the same edges. Theirs are made beforehand
and given to them; ours are made in every call. `gps` is compared as a block without `ctx.causal`, as GPSConv is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from altx.context import Context
from peers import Case, layer

WINDOW = 8


def window_edges(length: int, causal: bool) -> Tensor:
    """(2, E) edges between the tokens of a row that are less than a window apart, without self-loops."""
    back = torch.arange(WINDOW - 1, -WINDOW if not causal else 0, -1)
    target = torch.arange(length)[:, None].expand(-1, len(back))
    source = target - back
    keep = (source >= 0) & (source < length) & (source != target)
    return torch.stack([source[keep], target[keep]])


def cases(dim: int, length: int) -> list[Case]:
    try:
        from altx_graph import pyg
    except ImportError:
        return []
    heads = 4
    peers: dict[str, Callable[[], nn.Module]] = {
        "gcn": lambda: pyg.GCNConv(dim, dim),
        "gat": lambda: pyg.GATv2Conv(dim, dim // heads, heads),
        "graphsage": lambda: pyg.SAGEConv(dim, dim),
        "gin": lambda: pyg.GINConv(_perceptron(dim)),
        "graph-transformer": lambda: pyg.TransformerConv(dim, dim // heads, heads),
        "gps": lambda: pyg.GPSConv(
            dim, pyg.GINConv(_perceptron(dim)), heads, norm="layer_norm", norm_kwargs={"mode": "node"}
        ),
    }
    return [_case(name, peer(), dim, length) for name, peer in peers.items()]


def _perceptron(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))


def _case(name: str, peer: nn.Module, dim: int, length: int) -> Case:
    block = name == "gps"
    ours = layer(name, dim, window=WINDOW, **({"block": True} if block else {}))
    inside = next(module for module in ours.modules() if hasattr(module, "conv"))
    peer.load_state_dict((inside if block else inside.conv).state_dict())
    edges, ctx = window_edges(length, causal=not block), Context(causal=not block)

    def theirs(x: Tensor) -> Tensor:
        return torch.stack([peer(row, edges) for row in x])

    def mine(x: Tensor) -> Tensor:
        y: Tensor = ours(x, ctx).y
        return y

    return Case(name, mine, inside, {"torch-geometric": theirs})
