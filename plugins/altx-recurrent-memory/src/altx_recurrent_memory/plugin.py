"""What altx-recurrent-memory offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "recurrent-memory",
            summary="Recurrent memory: tokens around each segment, carried from one to the next (RMT)",
            description=(
                "[_, y_s, u_s] = blocks([m_{s-1}; x_s; m_{s-1}]),  m_s = norm(u_s), for segments x_s of the sequence\n"
                "Each segment costs what the blocks cost for segment + 2 tokens; sequential over segments.\n"
                "State: tokens dim numbers, and the blocks' own within one segment, whatever the length.\n"
                "Use it to carry what matters over inputs far longer than attention can hold; trained by\n"
                "backpropagation through a few segments, best with a curriculum of 1, 2, 3, ... of them."
            ),
            build="altx_recurrent_memory.memory:build",
            config="altx_recurrent_memory.config:RecurrentMemoryConfig",
            capabilities="altx_recurrent_memory.config:capabilities",
            paper=(
                "Bulatov, Kuratov, Burtsev 2022, Recurrent Memory Transformer, arXiv:2207.06881; "
                "Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT, arXiv:2304.11062"
            ),
            attach=("tokens",),
            default_attach="tokens",
        )
    ]
