"""What this distribution offers to altx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx.hookspecs import hookimpl
from altx.spec import MixerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

GRAPH = (
    "\nThe graph: window, dilated (1, 2, 4, ... tokens back) or knn (nearest of the window), made from the sequence,\n"
    "or the user's ctx.graph. Linear in T; state: the last W - 1 inputs per row, W = window; reach W per layer."
)


def _mixer(name: str, config: str, *, summary: str, description: str, paper: str) -> MixerSpec:
    return MixerSpec(
        name,
        summary=summary,
        description=description + GRAPH,
        build="altx_graph.mixer:build",
        config=f"altx_graph.config:{config}",
        capabilities="altx_graph.config:capabilities",
        paper=paper,
    )


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    return [
        _mixer(
            "gcn",
            "GCNConfig",
            summary="GCN: the normalised mean of a token's neighbours in a graph of tokens",
            description=(
                "y_i = W^T sum_j x_j / sqrt(d_j d_i) + b over the neighbours j of i and itself, d: their number.\n"
                "No weight depends on the tokens: over a window it is a moving average. The cheapest of its family."
            ),
            paper="Kipf & Welling 2017, Semi-Supervised Classification with Graph Convolutional Networks, "
            "arXiv:1609.02907",
        ),
        _mixer(
            "gat",
            "GATConfig",
            summary="GATv2: additive attention over a token's neighbours in a graph of tokens",
            description=(
                "y_i = sum_j a_ij W_l x_j + b over the neighbours j of i and itself, in each head;\n"
                "a_i = softmax_j(att . leaky_relu(W_l x_j + W_r x_i + W_e e_ij)). Use it where edges differ in worth."
            ),
            paper="Brody et al. 2022, How Attentive are Graph Attention Networks?, arXiv:2105.14491",
        ),
        _mixer(
            "graphsage",
            "GraphSAGEConfig",
            summary="GraphSAGE: a token and the mean or maximum of its neighbours in a graph of tokens",
            description=(
                "y_i = W_r x_i + W_l aggregate_j x_j + b over the neighbours j of i; aggregate: mean, max or sum.\n"
                "A token keeps a weight of its own, so it is not washed out by its neighbours as in gcn."
            ),
            paper="Hamilton et al. 2017, Inductive Representation Learning on Large Graphs, arXiv:1706.02216",
        ),
        _mixer(
            "gin",
            "GINConfig",
            summary="GIN: a perceptron on the sum of a token and its neighbours in a graph of tokens",
            description=(
                "y_i = MLP((1 + eps) x_i + sum_j x_j) over the neighbours j of i; with edge_dim,\n"
                "sum_j relu(x_j + W_e e_ij) (GINE). A sum tells apart what a mean does not: it counts."
            ),
            paper="Xu et al. 2019, How Powerful are Graph Neural Networks?, arXiv:1810.00826",
        ),
        _mixer(
            "graph-transformer",
            "GraphTransformerConfig",
            summary="Graph transformer: dot-product attention over a token's neighbours in a graph of tokens",
            description=(
                "y_i = W_s x_i + sum_j a_ij (W_v x_j + W_e e_ij) over the neighbours j of i, in each head;\n"
                "a_i = softmax_j(W_q x_i . (W_k x_j + W_e e_ij) / sqrt(d)). With beta, a gate weighs the two parts."
            ),
            paper="Shi et al. 2021, Masked Label Prediction: Unified Message Passing Model, arXiv:2009.03509",
        ),
        MixerSpec(
            "gps",
            summary="GPS: a graph convolution beside attention to all tokens of the row",
            description=(
                "y = conv(x, graph) + attention(x): any convolution of this plugin, and multi-head attention to all\n"
                "tokens of the row (causal: those before) without positions. With block=true the paper's whole layer:\n"
                "h = norm1(x + conv(x)) + norm2(x + attention(x)),  y = norm3(h + MLP(h)).\n"
                "Quadratic in T; state: W - 1 inputs, W = window, and a key and a value for every token.\n"
                "Use it where edges matter and some dependencies follow none; on graphs, its home."
            ),
            build="altx_graph.gps:build",
            config="altx_graph.config:GPSConfig",
            capabilities="altx_graph.config:gps_capabilities",
            paper="Rampasek et al. 2022, Recipe for a General, Powerful, Scalable Graph Transformer, arXiv:2205.12454",
        ),
    ]
