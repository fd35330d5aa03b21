"""What altx-knn offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "knn",
            summary="Memorizing Transformers: attention finds the k nearest of all keys of the past",
            description=(
                "the k keys of finished segments with the largest q . k join the softmax of an attention's own keys\n"
                "O(n) per token and head for n stored tokens, exact; or a search in a graph of near keys (usearch).\n"
                "State: each token's keys and values, to which no gradient flows; on disk if you give a path.\n"
                "Use it with attention of a window, which then reaches as far as memory or disk; it finds by content,\n"
                "at any distance; what is on disk outlasts the process."
            ),
            build="altx_knn.memory:build",
            config="altx_knn.config:KNNConfig",
            capabilities="altx_knn.config:capabilities",
            paper="Wu, Rabe, Hutchins, Szegedy 2022, Memorizing Transformers, arXiv:2203.08913",
            attach=("kv",),
            default_attach="kv",
        )
    ]
