"""GPS (Rampasek et al. 2022): message passing along edges, and attention to all tokens of the row.

B rows, T tokens of a call, K tokens kept for the edges, S tokens in the cache, H heads, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH, Layer, Output
from altx.layout import append
from altx.masking import RealFirst, real_first
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_graph import convs, pyg, slots
from altx_graph.config import (
    GATConfig,
    GCNConfig,
    GINConfig,
    GPSConfig,
    GraphConfig,
    GraphSAGEConfig,
    GraphTransformerConfig,
)
from altx_graph.edges import supplied
from altx_graph.mixer import refuse, token_graph
from altx_graph.token_graph import TokenGraph

KV = Leaf(seq_dim=1, kind="kv")
LOCAL: dict[str, type[GraphConfig]] = {
    "gcn": GCNConfig,
    "gat": GATConfig,
    "graphsage": GraphSAGEConfig,
    "gin": GINConfig,
    "graph-transformer": GraphTransformerConfig,
}
NORMS = {"layer": ("layer_norm", {"mode": "node"}), "batch": ("batch_norm", {}), "none": (None, {})}


class GPS(Layer):
    """y = conv(x) + attention(x); as a block, h = norm1(x + conv(x)) + norm2(x + attention(x)), y = norm3(h + MLP(h)).

    The block is equation 2 of the paper with section 3.1's norms. Parameters have the names of torch-geometric's
    GPSConv. torch-geometric's layer norm is over a whole graph by default; here it is over a token.

    Args:
        dim: D.
        layer: what holds the weights.
        graph: how edges are made; None: only `ctx.graph` has any.
        edge_dim: numbers on each edge of `ctx.graph`, or None.
        block: whether norms, residuals and perceptron are included.
    """

    conv: nn.Module
    attn: nn.MultiheadAttention
    mlp: nn.Module
    norm1: nn.Module | None
    norm2: nn.Module | None
    norm3: nn.Module | None

    def __init__(
        self, dim: int, layer: nn.Module, graph: TokenGraph | None, edge_dim: int | None = None, block: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim
        self.graph = graph
        self.edge_dim = edge_dim
        self.block = block
        names = ("conv", "attn", "mlp", "norm1", "norm2", "norm3") if block else ("conv", "attn")
        for name in names:
            self.add_module(name, getattr(layer, name))

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | None:
        if self.graph is None:
            return None
        weight = self.attn.out_proj.weight
        window = slots.empty(batch, self.graph.reach, self.dim, device or weight.device, dtype or weight.dtype)
        k, v = window["x"].new_zeros(2, batch, capacity or 0, self.dim).unbind()
        return State({**window.leaves, "k": k, "v": v}, {**window.spec, "k": KV, "v": KV}, seen=window.seen)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        refuse(self.graph, ctx, state)
        if not x.shape[1]:
            return Output(x, state)
        if ctx.graph is not None:
            # Edges number the tokens as they stand.
            x = x if ctx.mask is None else x.masked_fill(~ctx.mask[..., None], 0)
            reset = ctx.reset if ctx.reset is None or ctx.mask is None else ctx.reset & ctx.mask
            batch = RealFirst(x, ctx.mask, reset, None)
            held, after = slots.gather(batch, None)
            edges = supplied(ctx.graph, x, ctx)
            edges = replace(edges, attr=convs.attributes(self.conv, edges.attr, self.edge_dim))
            local = convs.convolve(self.conv, slots.Slots(x, 0), edges)
        else:
            assert self.graph is not None
            batch = real_first(x, ctx)
            held, after = slots.gather(batch, state)
            local = convs.convolve(self.conv, held, self.graph.edges(held, ctx.causal))
        q, k, v = F.linear(batch.x, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)
        if state is None:
            visible = _of_call(held, ctx.causal)
        else:
            assert after is not None and state.seen is not None
            k, v = (
                append(state[name], new, state.seen, batch.mask, in_place=ctx.donate_state)
                for name, new in (("k", k), ("v", v))
            )
            after = after.replace(k=k, v=v)
            visible = _of_cache(held, k.shape[1])
            k, v = k.to(q.dtype), v.to(q.dtype)
        everywhere = self.attn.out_proj(_attend(q, k, v, self.attn.num_heads, visible, ctx.causal))
        y = self._combine(batch.x, local, everywhere, batch.mask) if self.block else local + everywhere
        return Output(batch.restore(y), after)

    def _combine(self, x: Tensor, local: Tensor, everywhere: Tensor, mask: Tensor | None) -> Tensor:
        h = _normed(self.norm1, x + local, mask) + _normed(self.norm2, x + everywhere, mask)
        return _normed(self.norm3, h + self.mlp(h), mask)


def _of_call(held: slots.Slots, causal: bool) -> Tensor | None:
    """(B, T, T) bool: which tokens of the call a token sees: those of its document, none after it if causal."""
    document = held.document
    if document is None:
        return None
    visible = (document[:, :, None] == document[:, None]) & (document >= 0)[:, None]
    return visible.tril() if causal else visible


def _of_cache(held: slots.Slots, size: int) -> Tensor:
    """(B, T, S) bool: which tokens of the cache a token sees: from the first of its document up to itself."""
    assert held.document is not None and held.place is not None
    first = held.document[:, held.kept :, None]
    slot = torch.arange(size, device=first.device)
    return (slot >= first) & (slot <= first + held.place[:, held.kept :, None])


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, visible: Tensor | None, causal: bool) -> Tensor:
    """Attention of q (B, T, D) to k and v (B, S, D)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if visible is not None:
        # Only a masked token can see nothing; let it see anything, since softmax over nothing is NaN.
        visible = (visible | ~visible.any(-1, keepdim=True))[:, None]
    y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal and visible is None)
    return y.transpose(1, 2).flatten(2)


def _normed(norm: nn.Module | None, x: Tensor, mask: Tensor | None) -> Tensor:
    """A norm of (B, T, D). A batch norm is one of all real tokens."""
    if norm is None:
        return x
    y: Tensor
    if not isinstance(norm, pyg.BatchNorm):
        y = norm(x)
        return y
    if mask is None:
        return norm(x.flatten(0, 1)).view_as(x)  # type: ignore[no-any-return]
    return x.masked_scatter(mask[..., None], norm(x[mask]))


def build(config: GPSConfig, ctx: BuildContext) -> GPS:
    local = LOCAL[config.local]
    shared = {name: getattr(config, name) for name in ("graph", "window", "neighbours", "edge_dim", "heads")}
    conv = convs.make(local(**{name: value for name, value in shared.items() if name in local.model_fields}), ctx.dim)
    norm, options = NORMS[config.norm]
    layer = pyg.GPSConv(ctx.dim, conv, config.heads, norm=norm, norm_kwargs=options)
    return GPS(ctx.dim, layer, token_graph(config, conv), config.edge_dim, config.block)
