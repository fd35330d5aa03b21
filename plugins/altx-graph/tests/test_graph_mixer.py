"""What a mixer does with its edges: both ways of leaving some out, long sequences, low precision, the state."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from altx_graph import gps, mixer
from altx_graph.config import (
    GATConfig,
    GCNConfig,
    GINConfig,
    GPSConfig,
    GraphConfig,
    GraphSAGEConfig,
    GraphTransformerConfig,
)
from altx_graph.slots import Slots
from altx_graph.token_graph import TokenGraph

from altx import pieces, recipe, registry
from altx.compose import build as build_model
from altx.context import Context, Graph
from altx.layer import Layer
from altx.resolve import resolve
from altx.spec import BuildContext

DIM, LENGTH = 8, 17
KINDS: list[type[GraphConfig]] = [GCNConfig, GATConfig, GraphSAGEConfig, GINConfig, GraphTransformerConfig, GPSConfig]
exactly = {"atol": 1e-12, "rtol": 1e-12}


def make(kind: type[GraphConfig], **config: Any) -> Layer:
    torch.manual_seed(0)
    build: Any = gps.build if kind is GPSConfig else mixer.build
    layer: Layer = build(kind(**config), BuildContext(dim=DIM)).double()
    return layer


def contexts(rows: int) -> list[Context]:
    mask, reset = torch.rand(rows, LENGTH) < 0.7, torch.rand(rows, LENGTH) < 0.2
    return [Context(), Context(mask=mask, reset=reset), Context(causal=False, mask=mask)]


@pytest.mark.parametrize("graph", ["window", "knn"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_edges_that_are_not_there_may_be_left_out_or_lead_nowhere(
    kind: type[GraphConfig], graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices, and compiled graphs, keep them in the list."""
    layer, x = make(kind, graph=graph), torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    some = Graph(torch.tensor([[0, 2, 2, 20], [3, 2, 5, 21]]))
    calls = [(ctx, state) for ctx in contexts(3) for state in (None, layer.init_state(3)) if ctx.causal or not state]
    calls += [(ctx.replace(graph=some, reset=None), None) for ctx in contexts(3)]
    for ctx, state in calls:
        left_out = layer(x, ctx, state)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            kept = layer(x, ctx, state)
        real = torch.ones(3, LENGTH, dtype=torch.bool) if ctx.mask is None else ctx.mask
        torch.testing.assert_close(kept.y[real], left_out.y[real], **exactly)
        assert kept.y.isfinite().all() and left_out.y.isfinite().all()


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_long_sequences_in_pieces_are_the_whole(kind: type[GraphConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TOKENS", 6)
    monkeypatch.setattr(pieces, "SHORTEST", 2)
    layer, x = make(kind), torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    for ctx in contexts(3):
        real = torch.ones(3, LENGTH, dtype=torch.bool) if ctx.mask is None else ctx.mask
        whole = layer(x, ctx)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, ctx).y[real], whole.y[real], **exactly)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_window_sees_so_many_real_tokens_and_no_more(kind: type[GraphConfig]) -> None:
    layer, mask = make(kind, window=3), torch.ones(1, LENGTH, dtype=torch.bool)
    mask[0, [4, 5, 9]] = False
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    y = layer(x, Context(mask=mask)).y
    (seen,) = torch.autograd.grad(y[0, 6].square().sum(), x)
    assert seen.abs().amax(-1)[0].nonzero().flatten().tolist() == [2, 3, 6]


@torch.no_grad()
def test_dilated_edges_come_from_powers_of_two() -> None:
    layer = make(GCNConfig, graph="dilated", window=9)
    assert layer.graph.offsets == (8, 4, 2, 1)
    assert layer.init_state(2)["x"].shape == (2, 8, DIM)
    assert make(GCNConfig, graph="dilated", window=7).init_state(2)["x"].shape == (2, 4, DIM)


def test_a_token_is_its_own_neighbour_among_many_that_equal_it() -> None:
    edges = TokenGraph((5, 4, 3, 2, 1), nearest=2, loops=True).edges(Slots(torch.ones(1, LENGTH, DIM), 0), causal=False)
    found = set(zip(edges.source.tolist(), edges.target.tolist(), strict=True))
    assert {(t, t) for t in range(LENGTH)} <= found and len(found) == 3 * LENGTH


@torch.no_grad()
def test_equal_tokens_in_a_stream_choose_the_same_neighbours() -> None:
    """Ties between tokens that are the same vector."""
    layer = make(GATConfig, graph="knn", window=7, neighbours=3)
    x = torch.randn(4, DIM, dtype=torch.float64)[torch.randint(4, (2, LENGTH))]
    state, outputs = layer.init_state(2), []
    for t in range(LENGTH):
        out = layer(x[:, t : t + 1], Context(), state)
        state = out.state
        outputs.append(out.y)
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x).y, **exactly)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_low_precision_and_autocast_run_and_a_state_of_another_dtype_serves(kind: type[GraphConfig]) -> None:
    layer, x = make(kind).float(), torch.randn(2, LENGTH, DIM)
    whole = layer(x).y
    with torch.autocast("cpu", torch.bfloat16):
        state = layer.init_state(2)
        first = layer(x[:, :9], Context(), state)
        rest = layer(x[:, 9:], Context(), first.state)
    y = torch.cat([first.y, rest.y], 1).float()
    torch.testing.assert_close(y, whole, atol=0.1, rtol=0.1)
    assert rest.state["x"].dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        low = make(kind).to(dtype)
        out = low(x.to(dtype), Context(), low.init_state(2, dtype=torch.float32))
        assert out.y.dtype == dtype and out.y.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_is_legal(kind: type[GraphConfig]) -> None:
    layer = make(kind)
    state = layer.init_state(2)
    out = layer(torch.zeros(2, 0, DIM, dtype=torch.float64), Context(), state)
    assert out.y.shape == (2, 0, DIM) and out.state is state
    assert layer(torch.zeros(0, 3, DIM, dtype=torch.float64)).y.shape == (0, 3, DIM)
    none = Graph(torch.zeros(2, 0, dtype=torch.int64))
    assert layer(torch.ones(2, 3, DIM, dtype=torch.float64), Context(graph=none)).y.isfinite().all()


@pytest.mark.parametrize("name", ["gcn", "gat", "graphsage", "gin", "graph-transformer", "gps"])
def test_every_published_width_is_accepted(name: str) -> None:
    for dim in (16, 32, 64, 768):
        blueprint = resolve(recipe.load({"dim": dim, "layers": 1, "mixer": name}), registry.default())
        assert build_model(blueprint, device="meta").capabilities.steps


def test_composing_says_nothing_and_listing_imports_nothing() -> None:
    """torch-geometric's import warns, and takes seconds."""
    code = """
import sys, warnings
warnings.simplefilter("error")
from altx import registry
assert {"gcn", "gps"} <= {c.name for c in registry.default().components("mixer")}
assert "torch" not in sys.modules and "torch_geometric" not in sys.modules
from altx.compose import compose
compose({"dim": 16, "layers": 1, "mixer": "gps"})
assert "torch_geometric" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
