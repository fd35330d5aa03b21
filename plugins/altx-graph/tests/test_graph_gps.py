"""GPS against torch-geometric's GPSConv, and against its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from altx_graph import pyg
from altx_graph.config import GPSConfig
from altx_graph.gps import GPS, build
from torch import Tensor, nn

from altx.context import Context, Graph
from altx.spec import BuildContext

exactly = {"atol": 1e-12, "rtol": 1e-12}
DIM = 8
SIZES = (5, 1, 7)


def make(**config: Any) -> GPS:
    torch.manual_seed(0)
    ours = build(GPSConfig(window=4, **config), BuildContext(dim=DIM)).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return ours


def peer(ours: GPS, norm: str) -> nn.Module:
    """GPSConv with the same weights."""
    perceptron = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))
    options = {"norm": "batch_norm"} if norm == "batch" else {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}}
    theirs = pyg.GPSConv(DIM, pyg.GINConv(perceptron), heads=4, **options).double()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def graphs() -> tuple[Tensor, Tensor, Tensor, Tensor, Context]:
    """Nodes (N, D), their edges and their graphs; the same as rows of tokens, with a context."""
    x = torch.randn(sum(SIZES), DIM, dtype=torch.float64)
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    row, place = mask.nonzero().unbind(1)
    pairs = [(a, b) for a in range(len(x)) for b in range(len(x)) if row[a] == row[b] and torch.rand(()) < 0.4]
    edges = torch.tensor(pairs).T
    tokens = torch.full((3, max(SIZES), DIM), torch.nan, dtype=torch.float64)
    tokens[mask] = x
    token = row * max(SIZES) + place
    return x, edges, row, tokens, Context(causal=False, mask=mask, graph=Graph(token[edges]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@torch.no_grad()
def test_the_block_is_gpsconv_on_a_batch_of_graphs(norm: str, training: bool) -> None:
    ours = make(block=True, norm=norm, graph="supplied").train(training)
    theirs = peer(ours, norm).train(training)
    x, edges, row, tokens, ctx = graphs()
    for _ in range(2):  # the second time with the statistics that the first left
        y = ours(tokens, ctx).y
        torch.testing.assert_close(y[ctx.mask], theirs(x, edges, row), **exactly)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, **exactly)


@torch.no_grad()
def test_a_causal_block_gives_each_token_what_gpsconv_gives_the_last_of_its_prefix() -> None:
    """A prefix has edges from the past only, as the whole does, and its last token sees all of it."""
    ours = make(block=True).eval()
    theirs = peer(ours, "layer").eval()
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    y = ours(x).y
    for t in range(9):
        edges = [(s, u) for u in range(t + 1) for s in range(max(0, u - 3), u)]
        prefix = theirs(x[0, : t + 1], torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T)
        torch.testing.assert_close(y[0, t], prefix[-1], **exactly)


@torch.no_grad()
def test_without_its_block_it_is_the_sum_of_a_convolution_and_of_attention() -> None:
    ours = make().eval()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    edges = torch.tensor([(s, t) for t in range(9) for s in range(max(0, t - 3), t)]).T
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    attention = ours.attn(x, x, x, attn_mask=hidden, need_weights=False)[0]
    local = torch.stack([ours.conv(row, edges) for row in x])
    torch.testing.assert_close(ours(x).y, local + attention, **exactly)


def test_a_batch_norm_is_for_encoders() -> None:
    from altx.compose import compose
    from altx.errors import CompositionError

    mixer = {"name": "gps", "block": True, "norm": "batch"}
    with pytest.raises(CompositionError, match="cannot enter a causal model"):
        compose({"dim": 16, "blocks": [{"sublayers": [{"mixer": mixer}]}]})
    head = {"kind": "classifier", "classes": 2}
    compose({"dim": 16, "causal": False, "head": head, "blocks": [{"sublayers": [{"mixer": mixer}]}]})
