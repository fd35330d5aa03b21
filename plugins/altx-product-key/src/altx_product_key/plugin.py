"""What altx-product-key offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "product-key",
            summary="Product-key memory: N^2 learned values, of which each head reads the k that fit best",
            description=(
                "y = sum over heads and their k best pairs (i, j) of softmax(q1 k1_i + q2 k2_j) value_ij\n"
                "O(N + k log k) scores and k rows per token and head, of a table of N^2 rows; no token sees another.\n"
                "State: none. What it holds are parameters, written by training; values have a learning rate of their\n"
                "own, 0.001.\n"
                "Takes the feed-forward's place in one or two blocks, for many parameters at little compute."
            ),
            build="altx_product_key.product_key:build",
            config="altx_product_key.config:ProductKeyConfig",
            capabilities="altx_product_key.config:capabilities",
            paper="Lample et al. 2019, Large Memory Layers with Product Keys, arXiv:1907.05242",
            attach=("ffn",),
            default_attach="ffn",
        ),
        MemorySpec(
            "memory-layer",
            summary="Memory layer at scale: product keys, values that layers share, a gated projection after them",
            description=(
                "y = W (m * silu(V x)),  m = sum over heads and their k best pairs (i, j) of softmax(...) value_ij\n"
                "O(N + k log k) scores and k rows per token and head, of one table of N^2 rows for all such layers of\n"
                "a model; no token sees another.\n"
                "State: none. Values are parameters with a learning rate of their own, 0.001.\n"
                "Takes the feed-forward's place in a few blocks, e.g. every eighth, for facts more than for reasoning."
            ),
            build="altx_product_key.memory_layer:build",
            config="altx_product_key.config:MemoryLayerConfig",
            capabilities="altx_product_key.config:capabilities",
            paper="Berges et al. 2024, Memory Layers at Scale, arXiv:2412.09764",
            attach=("ffn",),
            default_attach="ffn",
        ),
    ]
