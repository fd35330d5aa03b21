"""Every mixer against torch-geometric's own layer with the same weights, over edges listed by plain loops; GCN and
GATv2 also against their papers' equations, written as loops."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from altx_graph import pyg
from altx_graph.config import GATConfig, GCNConfig, GINConfig, GraphSAGEConfig, GraphTransformerConfig
from altx_graph.mixer import build
from torch import Tensor, nn

from altx.context import Context, Graph
from altx.layer import FRESH, Layer
from altx.spec import BuildContext

exactly = {"atol": 1e-12, "rtol": 1e-12}
DIM, LENGTH, WINDOW, NEAREST = 8, 13, 5, 2

CONFIGS: dict[str, Any] = {
    "gcn": GCNConfig,
    "gat": GATConfig,
    "graphsage": GraphSAGEConfig,
    "gin": GINConfig,
    "graph-transformer": GraphTransformerConfig,
}


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))


def peer(name: str, **options: Any) -> nn.Module:
    """torch-geometric's layer with the settings of our defaults, as its users build it."""
    made: nn.Module = {
        "gcn": partial(pyg.GCNConv, DIM, DIM),
        "gat": partial(pyg.GATv2Conv, DIM, DIM // 4, heads=4),
        "graphsage": partial(pyg.SAGEConv, DIM, DIM),
        "gin": partial(pyg.GINEConv if "edge_dim" in options else pyg.GINConv, perceptron()),
        "graph-transformer": partial(pyg.TransformerConv, DIM, DIM // 4, heads=4),
    }[name](**options)
    return made


def make(name: str, options: dict[str, Any] | None = None, **config: Any) -> tuple[Layer, nn.Module]:
    """A mixer and its peer, with `options` of its own, with the same weights, in float64."""
    torch.manual_seed(0)
    ours = build(CONFIGS[name](window=WINDOW, neighbours=NEAREST, **config), BuildContext(dim=DIM)).double().eval()
    theirs = peer(name, **(options or {})).double().eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.conv.state_dict())
    return ours, theirs


def edges(x: Tensor, graph: str, causal: bool) -> list[tuple[int, int]]:
    """Edges (source, target) over the tokens of x (T, D), without self-loops."""
    found = []
    for t in range(len(x)):
        near = [s for s in range(len(x)) if s != t and abs(t - s) < WINDOW and (s < t or not causal)]
        if graph == "dilated":
            near = [s for s in near if abs(t - s) in (1, 2, 4)]
        if graph == "knn":
            near = sorted(near, key=lambda s: float((x[t] - x[s]).norm()))[:NEAREST]
        found += [(s, t) for s in near]
    return found


def index(pairs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("graph", ["window", "dilated", "knn"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_mixer_equals_the_layer_of_torch_geometric_on_the_same_edges(name: str, graph: str, causal: bool) -> None:
    ours, theirs = make(name, graph=graph)
    x = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    mask = torch.rand(3, LENGTH) < 0.7
    reset = torch.zeros(3, LENGTH, dtype=torch.bool)
    reset[1, 6] = True
    for ctx in (
        Context(causal=causal),
        Context(causal=causal, mask=mask),
        Context(causal=causal, mask=mask, reset=reset),
    ):
        y = ours(x, ctx).y
        for b in range(3):
            real = torch.ones(LENGTH, dtype=torch.bool) if ctx.mask is None else mask[b]
            cuts = [0, 6, LENGTH] if ctx.reset is not None and reset[b, 6] and mask[b, 6] else [0, LENGTH]
            for start, stop in itertools.pairwise(cuts):
                here = torch.zeros_like(real)
                here[start:stop] = real[start:stop]
                tokens = x[b, here]
                expected = theirs(tokens, index(edges(tokens, graph, causal)))
                torch.testing.assert_close(y[b, here], expected, **exactly)
    if causal:
        state, pieces = ours.init_state(3), []
        for start, stop in ((0, 1), (1, 4), (4, 5), (5, LENGTH)):
            out = ours(x[:, start:stop], FRESH, state)
            state = out.state
            pieces.append(out.y)
        torch.testing.assert_close(torch.cat(pieces, 1), ours(x).y, **exactly)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_float32_agrees_with_float64(name: str) -> None:
    ours, theirs = make(name)
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    expected = theirs(x[0], index(edges(x[0], "window", True)))
    torch.testing.assert_close(ours.float()(x.float()).y[0].double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gcn_equals_its_papers_equation() -> None:
    """Kipf & Welling 2017, equation 2, with D the row sums of A + I: row i of A holds the edges into i."""
    ours, _ = make("gcn")
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    neighbours = [range(max(0, t - WINDOW + 1), t + 1) for t in range(LENGTH)]
    for t in range(LENGTH):
        expected = ours.conv.bias.clone()
        for s in neighbours[t]:
            expected += ours.conv.lin.weight @ x[0, s] / math.sqrt(len(neighbours[t]) * len(neighbours[s]))
        torch.testing.assert_close(ours(x).y[0, t], expected, **exactly)


@torch.no_grad()
def test_gat_equals_its_papers_equations() -> None:
    """Brody et al. 2022, equations 1, 3 and 7."""
    ours, _ = make("gat")
    conv, width = ours.conv, DIM // 4
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    for t in range(LENGTH):
        near = range(max(0, t - WINDOW + 1), t + 1)
        heads = []
        for h in range(4):
            rows = slice(h * width, (h + 1) * width)
            left = [conv.lin_l.weight[rows] @ x[0, s] + conv.lin_l.bias[rows] for s in near]
            right = conv.lin_r.weight[rows] @ x[0, t] + conv.lin_r.bias[rows]
            scores = [
                sum(
                    float(a) * (v if v > 0 else 0.2 * v)
                    for a, v in zip(conv.att[0, h], (l + right).tolist(), strict=True)
                )
                for l in left
            ]
            total = sum(math.exp(score) for score in scores)
            heads.append(sum(math.exp(score) / total * l for score, l in zip(scores, left, strict=True)))
        torch.testing.assert_close(ours(x).y[0, t], torch.cat(heads) + conv.bias, **exactly)


OPTIONS: dict[str, Any] = {
    "gcn-without-bias": ("gcn", {"bias": False}, {"bias": False}),
    "gat-shared": (
        "gat",
        {"share_weights": True, "negative_slope": 0.1},
        {"share_weights": True, "negative_slope": 0.1},
    ),
    "graphsage-pool": ("graphsage", {"aggregate": "max", "project": True}, {"aggr": "max", "project": True}),
    "graphsage-normalised": ("graphsage", {"aggregate": "sum", "normalise": True}, {"aggr": "sum", "normalize": True}),
    "gin-eps": ("gin", {"eps": 0.3, "train_eps": True}, {"train_eps": True}),
    "graph-transformer-gated": ("graph-transformer", {"beta": True, "bias": False}, {"beta": True, "bias": False}),
}


@pytest.mark.parametrize(("name", "config", "options"), OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_a_setting_is_that_of_torch_geometric(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    ours, theirs = make(name, options, **config)
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x).y[0], theirs(x[0], index(edges(x[0], "window", True))), **exactly)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("name", ["gat", "gin", "graph-transformer", "gcn"])
@torch.no_grad()
def test_what_edges_carry_is_used_as_torch_geometric_does(name: str, causal: bool) -> None:
    width = {} if name == "gcn" else {"edge_dim": 3}
    ours, theirs = make(name, width, graph="supplied", **width)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    given = some_edges(2, causal)
    carried = torch.rand(given.shape[1], 3 if width else 1, dtype=torch.float64)
    y = ours(x, Context(causal=causal, graph=Graph(given, carried))).y
    expected = theirs(x.flatten(0, 1), given, carried if width else carried[:, 0])
    torch.testing.assert_close(y.flatten(0, 1), expected, **exactly)


def some_edges(rows: int, causal: bool) -> Tensor:
    """(2, 40) edges within rows of LENGTH tokens."""
    row, a, b = torch.randint(rows, (40,)), torch.randint(LENGTH, (40,)), torch.randint(LENGTH, (40,))
    if causal:
        a, b = torch.minimum(a, b), torch.maximum(a, b)
    return torch.stack([row * LENGTH + a, row * LENGTH + b])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_supplied_graph_is_that_of_torch_geometric(name: str) -> None:
    """Over all rows at once; edges of masked tokens are not there."""
    for graph, causal in (("supplied", False), ("window", True)):
        ours, theirs = make(name, graph=graph)
        x = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
        given = some_edges(3, causal)
        y = ours(x, Context(causal=causal, graph=Graph(given))).y
        torch.testing.assert_close(y.flatten(0, 1), theirs(x.flatten(0, 1), given), **exactly)
        mask = torch.rand(3, LENGTH) < 0.7
        y = ours(x.masked_fill(~mask[..., None], torch.nan), Context(causal=causal, graph=Graph(given), mask=mask)).y
        left = given[:, mask.flatten()[given].all(0)]
        torch.testing.assert_close(y[mask], theirs(x.flatten(0, 1), left)[mask.flatten()], **exactly)
