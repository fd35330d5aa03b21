"""Graphs batched by torch-geometric, as rows of tokens and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from altx_graph import mixer, pyg
from altx_graph.batching import to_nodes, to_tokens
from altx_graph.config import GCNConfig

from altx.compose import compose
from altx.context import Graph
from altx.errors import UnsupportedContext
from altx.spec import BuildContext


def graphs() -> list[Any]:
    from torch_geometric.data import Data

    torch.manual_seed(0)
    found = []
    for nodes, edges in ((4, 6), (1, 0), (6, 9)):
        index = torch.randint(nodes, (2, edges))
        found.append(Data(x=torch.randn(nodes, 8), edge_index=index, edge_attr=torch.rand(edges, 3)))
    return found


def batched() -> Any:
    from torch_geometric.data import Batch

    assert pyg  # imported first: it silences the warning of the import
    return Batch.from_data_list(graphs())


def test_nodes_go_to_tokens_and_back() -> None:
    batch = batched()
    x, ctx = to_tokens(batch)
    assert x.shape == (3, 6, 8) and not ctx.causal
    assert ctx.mask is not None and ctx.mask.sum(1).tolist() == [4, 1, 6]
    assert torch.equal(to_nodes(x, ctx), batch.x) and not x[~ctx.mask].any()
    assert isinstance(ctx.graph, Graph) and ctx.graph.edge_attr is batch.edge_attr
    row, place = ctx.graph.edge_index // 6, ctx.graph.edge_index % 6
    for index, graph in enumerate(graphs()):
        assert torch.equal(place[:, row[0] == index], graph.edge_index)
    wide, ctx = to_tokens(batch, rows=4, length=7)
    assert wide.shape == (4, 7, 8) and torch.equal(to_nodes(wide, ctx), batch.x)


def test_one_graph_is_one_row() -> None:
    x, ctx = to_tokens(graphs()[2])
    assert x.shape == (1, 6, 8) and torch.equal(to_nodes(x, ctx), graphs()[2].x)


@torch.no_grad()
def test_a_convolution_over_tokens_is_that_over_the_batch() -> None:
    batch = batched()
    batch.edge_attr = batch.edge_attr[:, 0]
    ours, theirs = mixer.build(GCNConfig(graph="supplied"), BuildContext(dim=8)), pyg.GCNConv(8, 8)
    theirs.load_state_dict(ours.conv.state_dict())
    x, ctx = to_tokens(batch)
    torch.testing.assert_close(to_nodes(ours(x, ctx).y, ctx), theirs(batch.x, batch.edge_index, batch.edge_attr))


def test_a_model_of_graphs_learns_and_sees_each_graph_alone() -> None:
    data = {
        "dim": 16,
        "causal": False,
        "mixer": "gps,gat,attention",
        "input": {"kind": "vectors", "size": 8},
        "head": {"kind": "classifier", "classes": 2},
    }
    model = compose(data, {"gps.graph": "supplied", "gps.block": True, "gps.norm": "batch"}, seed=0)
    batch = batched()
    batch.edge_attr = None
    x, ctx = to_tokens(batch)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x, ctx).y, torch.tensor([0, 1, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    model.eval()
    for index, graph in enumerate(graphs()):
        graph.edge_attr = None
        torch.testing.assert_close(model(*to_tokens(graph)).y[0], model(x, ctx).y[index], atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    batch = batched()
    with pytest.raises(UnsupportedContext, match="3 graphs of up to 6 nodes do not fit into 2 rows of 6 tokens"):
        to_tokens(batch, rows=2)
    with pytest.raises(UnsupportedContext, match="do not fit into 3 rows of 5 tokens"):
        to_tokens(batch, length=5)
    batch.batch = batch.batch.flip(0)
    with pytest.raises(UnsupportedContext, match="does not ascend"):
        to_tokens(batch)
    batch.x = None
    with pytest.raises(UnsupportedContext, match="no x or no edge_index"):
        to_tokens(batch)
