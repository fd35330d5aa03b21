"""Configs and capabilities of the graph mixers. Never imports torch or torch-geometric."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import Capabilities
from altx.config import Config

ACCEPTED = "window, dilated or knn make one from the sequence, supplied takes ctx.graph"


class GraphConfig(Config):
    """Where the edges come from: what all graph mixers share."""

    graph: Literal["window", "dilated", "knn", "supplied"] | None = Field(
        "window",
        description="edges of each token: window: from the tokens before it; dilated: from those 1, 2, 4, ... before "
        "it; knn: from those of the window nearest to it in feature space; supplied: ctx.graph. Without ctx.causal, "
        "from as many after it. A ctx.graph that is given takes the place of the first three",
    )
    window: int | None = Field(
        8, ge=2, description="W: edges reach from the W - 1 real tokens before a token, and it sees itself"
    )
    neighbours: int = Field(4, gt=0, description="k of knn")

    @model_validator(mode="after")
    def _has_edges(self) -> Self:
        if self.graph is None:
            raise ValueError(f"a graph mixer needs a graph: {ACCEPTED}")
        if self.graph != "supplied" and self.window is None:
            raise ValueError(
                f"graph {self.graph} needs a window, the number of tokens in reach; use window 8, or graph supplied"
            )
        if self.graph == "knn" and self.window is not None and self.neighbours >= self.window:
            raise ValueError(
                f"neighbours {self.neighbours} are no choice among the window - 1 = {self.window - 1} tokens before; "
                f"use neighbours below {self.window}, or graph window"
            )
        return self

    @property
    def offsets(self) -> tuple[int, ...]:
        """How far back an edge may come from, the farthest first."""
        if self.graph == "supplied" or self.window is None:
            return ()
        reach = range(self.window - 1, 0, -1)
        return tuple(o for o in reach if o & (o - 1) == 0) if self.graph == "dilated" else tuple(reach)


class EdgeConfig(GraphConfig):
    """A mixer that weighs vectors on the edges."""

    edge_dim: int | None = Field(None, gt=0, description="F of ctx.graph.edge_attr (E, F); default: it takes none")

    @model_validator(mode="after")
    def _has_edge_attr(self) -> Self:
        if self.edge_dim and self.graph != "supplied":
            raise ValueError(
                f"edges of graph {self.graph} have no attributes, so edge_dim has no use; use graph supplied, or no "
                "edge_dim"
            )
        return self


class HeadsConfig(EdgeConfig):
    """A mixer with heads, whose outputs are laid end to end."""

    heads: int = Field(4, gt=0, description="heads; each has model width / heads channels")

    def fit(self, dim: int) -> None:
        if dim % self.heads:
            usable = [n for n in range(1, dim + 1) if dim % n == 0]
            nearest = [n for n in usable if n < self.heads][-1:] + [n for n in usable if n > self.heads][:1]
            raise ValueError(
                f"dim {dim} is not divisible by heads {self.heads}; use heads {' or '.join(map(str, nearest))}, "
                f"or dim {-(-dim // self.heads) * self.heads}"
            )


class GCNConfig(GraphConfig):
    """Config of `gcn`."""

    bias: bool = Field(True, description="bias of the output")


class GATConfig(HeadsConfig):
    """Config of `gat`."""

    negative_slope: float = Field(0.2, description="slope of leaky_relu below 0")
    share_weights: bool = Field(False, description="one matrix for both ends of an edge")
    bias: bool = Field(True, description="biases of the projections and the output")


class GraphSAGEConfig(GraphConfig):
    """Config of `graphsage`."""

    aggregate: Literal["mean", "max", "sum"] = Field("mean", description="how the neighbours become one vector")
    project: bool = Field(False, description="a layer with ReLU on each neighbour first (with max: the paper's pool)")
    normalise: bool = Field(False, description="scale outputs to length 1, as the paper's algorithm does")
    bias: bool = Field(True, description="bias of the output")


class GINConfig(EdgeConfig):
    """Config of `gin`."""

    hidden: int | None = Field(None, gt=0, description="inner width of the perceptron; default: model width")
    eps: float = Field(0.0, description="a token's own weight is 1 + eps")
    train_eps: bool = Field(False, description="learn eps")


class GraphTransformerConfig(HeadsConfig):
    """Config of `graph-transformer`."""

    beta: bool = Field(False, description="a learned gate between a token's own part and that of its neighbours")
    bias: bool = Field(True, description="biases of the projections")


class GPSConfig(HeadsConfig):
    """Config of `gps`."""

    local: Literal["gcn", "gat", "graphsage", "gin", "graph-transformer"] = Field(
        "gin", description="the part that follows edges, with default settings"
    )
    block: bool = Field(
        False,
        description="the paper's whole layer, with its own norms, residuals and perceptron, instead of its two parts "
        "as one branch of a pre-norm block",
    )
    norm: Literal["layer", "batch", "none"] = Field(
        "layer", description="the block's norms; batch, the paper's, mixes tokens and rows in training: encoders only"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.edge_dim and self.local in ("gcn", "graphsage"):
            raise ValueError(f"local {self.local} has no use for edge_dim; use local gat, gin or graph-transformer")
        return self


def capabilities(config: GraphConfig) -> Capabilities:
    """Edges made from the sequence stream: the state is the inputs in reach. A supplied graph is one of whole rows."""
    if config.graph == "supplied":
        # Edges are picked by what they are, so their number is known only when it runs.
        return Capabilities(bidirectional=True, streaming="none", graph="required", compiles=False)
    return Capabilities(bidirectional=True, growth="window", rollback="snapshot", graph="optional")


def gps_capabilities(config: GPSConfig) -> Capabilities:
    """As above; attention to all tokens before makes the state grow, and a block brings its norms and residuals."""
    base = capabilities(config)
    batch = config.block and config.norm == "batch"
    return replace(
        base,
        causal=not batch,
        streaming="none" if batch else base.streaming,
        growth="none" if batch or base.growth == "none" else "linear",
        rollback="none" if batch else base.rollback,
        includes=frozenset({"norm", "residual"} if config.block else ()),
        compiles=base.compiles and not batch,  # its statistics are of the real tokens, however many
    )
