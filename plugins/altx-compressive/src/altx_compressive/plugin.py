"""What altx-compressive offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "compressive",
            summary="Compressive Transformer: what an attention no longer sees it still sees compressed",
            description=(
                "each segment that leaves a queue of recent tokens becomes segment / ratio slots, whose keys and\n"
                "values join the softmax of an attention's own; by mean, max, or a convolution that learns to have\n"
                "attention find in them what it found before (a loss of its own, which touches nothing else).\n"
                "O(compressed) per token and head. State: keys and values of segment + memory + compressed slots.\n"
                "Use it with attention of a window, of memory + segment tokens, which then reaches ratio times as far."
            ),
            build="altx_compressive.memory:build",
            config="altx_compressive.config:CompressiveConfig",
            capabilities="altx_compressive.config:capabilities",
            paper="Rae, Potapenko, Jayakumar, Lillicrap 2019, Compressive Transformers for Long-Range Sequence "
            "Modelling, arXiv:1911.05507",
            attach=("kv",),
            default_attach="kv",
        )
    ]
