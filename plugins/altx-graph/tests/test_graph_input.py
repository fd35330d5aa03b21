"""Bad input: each says what is wrong, and what would be accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from altx_graph import gps, mixer
from altx_graph.config import GATConfig, GCNConfig, GINConfig, GPSConfig, GraphSAGEConfig

from altx.compose import compose
from altx.context import Context, Graph
from altx.errors import CompositionError, ConfigError, UnsupportedContext
from altx.layer import Layer
from altx.spec import BuildContext

DIM, LENGTH = 8, 4


def refused(layer: Layer, message: str, ctx: Context, rows: int = 2) -> None:
    with pytest.raises(UnsupportedContext, match=message):
        layer(torch.randn(rows, LENGTH, DIM), ctx)


def gcn(**config: Any) -> Layer:
    return mixer.build(GCNConfig(**config), BuildContext(dim=DIM))


def edges(*pairs: tuple[int, int], attr: torch.Tensor | None = None) -> Graph:
    return Graph(torch.tensor(pairs).T, attr)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "gcn",
            {"graph": None},
            "needs a graph: window, dilated or knn make one .*, supplied takes ctx.graph",
        ),
        (
            "gat",
            {"window": None},
            "graph window needs a window, .* use window 8, or graph supplied",
        ),
        ("gin", {"window": 1}, "greater than or equal to 2"),
        ("gcn", {"graph": "lattice"}, "'window', 'dilated', 'knn' or 'supplied'"),
        ("gcn", {"graph": "knn", "neighbours": 8}, r"no choice among the window - 1 = 7 .* use neighbours below 8"),
        ("gin", {"edge_dim": 3}, "edges of graph window have no attributes.* use graph supplied, or no edge_dim"),
        ("gat", {"heads": 3}, "dim 16 is not divisible by heads 3; use heads 2 or 4, or dim 18"),
        (
            "gps",
            {"graph": "supplied", "edge_dim": 2, "local": "gcn"},
            "local gcn has no use for edge_dim; use local gat",
        ),
    ],
)
def test_a_config_is_refused_when_composing(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose({"dim": 16, "layers": 1, "mixer": name}, {f"{name}.{key}": value for key, value in settings.items()})


def test_a_mixer_of_supplied_graphs_is_refused_in_a_causal_model_and_works_in_an_encoder() -> None:
    with pytest.raises(CompositionError, match=r"does not stream and reads a graph(.|\n)*encoder \(causal: false\)"):
        compose({"dim": 16, "layers": 1, "mixer": "gcn"}, {"gcn.graph": "supplied"})
    head = {"kind": "vectors", "size": 2}
    model = compose({"dim": 16, "layers": 1, "mixer": "gcn", "causal": False, "head": head}, {"gcn.graph": "supplied"})
    text = torch.zeros(2, LENGTH, dtype=torch.int64)
    with pytest.raises(UnsupportedContext, match=r"needs a ctx.graph"):
        model(text)
    assert model(text, Context(graph=edges((3, 0), (4, 7)))).y.shape == (2, LENGTH, 2)


@pytest.mark.parametrize("make", [gcn, lambda: gps.build(GPSConfig(), BuildContext(dim=DIM))])
def test_a_bad_edge_is_named(make: Any) -> None:
    layer, good = make(), (0, 1)
    causal, both = Context(), Context(causal=False)
    reset, mask = torch.zeros(2, LENGTH, dtype=torch.bool), torch.ones(2, LENGTH, dtype=torch.bool)
    reset[1, 2] = True
    for ctx, pairs, message in (
        (
            causal,
            [good, (2, 8)],
            "edge 1 of ctx.graph, 2 -> 8, leaves the 2 x 4 = 8 tokens\ntokens are numbered",
        ),
        (both, [good, (-1, 0)], "edge 1 of ctx.graph, -1 -> 0, leaves the 2 x 4 = 8 tokens"),
        (both, [good, good, (3, 4)], "edge 2 of ctx.graph, 3 -> 4, leads from row 0 to row 1"),
        (
            causal,
            [(6, 5)],
            "edge 0 of ctx.graph, 6 -> 5, comes from the future in a causal model\nleave such",
        ),
        (causal.replace(reset=reset), [good, (5, 6)], "edge 1 of ctx.graph, 5 -> 6, crosses a ctx.reset"),
    ):
        refused(layer, message, ctx.replace(graph=edges(*pairs)))
    mask[1, 2] = False  # the reset at a masked token means nothing
    layer(torch.randn(2, LENGTH, DIM), causal.replace(graph=edges(good, (5, 7)), reset=reset, mask=mask))
    layer(torch.randn(2, LENGTH, DIM), both.replace(graph=edges((6, 5))))


def test_a_graph_of_another_form_is_refused() -> None:
    for graph, message in (
        (Graph(torch.ones(3, 2).long()), r"must be \(2, E\) int64, source to target; it is \(3, 2\) int64"),
        (Graph(torch.zeros(2, 2)), r"it is \(2, 2\) float32"),
        (edges((0, 1), attr=torch.ones(2, 1)), r"a row for each of the 1 edges; it is \(2, 1\)"),
    ):
        refused(gcn(), message, Context(graph=graph))


def test_what_edges_carry_must_be_what_the_layer_takes() -> None:
    one, two = edges((0, 1), attr=torch.ones(1)), edges((0, 1), attr=torch.ones(1, 2))
    refused(gcn(), r"has 2 numbers for each edge, and the layer takes 1", Context(graph=two))
    sage = mixer.build(GraphSAGEConfig(), BuildContext(dim=DIM))
    refused(sage, r"has 1 numbers for each edge, and the layer takes none\nleave them out", Context(graph=one))
    for config in (GATConfig, GINConfig):
        without = mixer.build(config(), BuildContext(dim=DIM))
        refused(without, r"takes none\nset graph supplied and edge_dim, or leave edge_attr out", Context(graph=one))
        having = mixer.build(config(graph="supplied", edge_dim=2), BuildContext(dim=DIM))
        refused(having, r"has no edge_attr, and the layer was built with edge_dim 2", Context(graph=edges((0, 1))))
        refused(having, r"has 1 numbers for each edge, and the layer takes 2", Context(graph=one))
        having(torch.randn(2, LENGTH, DIM), Context(graph=two))


def test_what_cannot_continue_a_state_says_so() -> None:
    layer, x = gcn(), torch.randn(2, LENGTH, DIM)
    with pytest.raises(UnsupportedContext, match="cannot continue a state"):
        layer(x, Context(graph=edges((0, 1))), layer.init_state(2))
    with pytest.raises(UnsupportedContext, match="looks both ways"):
        layer(x, Context(causal=False), layer.init_state(2))
    refused(gcn(graph="supplied"), "needs a ctx.graph(.|\n)*window, dilated or knn", Context())
