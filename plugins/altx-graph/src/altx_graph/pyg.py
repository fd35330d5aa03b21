"""The one place that imports torch-geometric, and only when a layer is built."""

from __future__ import annotations

import warnings

import torch

with warnings.catch_warnings():
    # It still calls torch.jit.script, of which torch says at import that it will go.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn import (  # type: ignore[import-untyped]
        BatchNorm,
        GATv2Conv,
        GCNConv,
        GINConv,
        GINEConv,
        GPSConv,
        SAGEConv,
        TransformerConv,
    )
    from torch_geometric.nn.conv.gcn_conv import gcn_norm  # type: ignore[import-untyped]
    from torch_geometric.utils import add_self_loops, remove_self_loops  # type: ignore[import-untyped]

    # The first sparse matrix of a process says that they are in beta.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), device="cpu")

__all__ = [
    "BatchNorm",
    "GATv2Conv",
    "GCNConv",
    "GINConv",
    "GINEConv",
    "GPSConv",
    "SAGEConv",
    "TransformerConv",
    "add_self_loops",
    "gcn_norm",
    "remove_self_loops",
]
