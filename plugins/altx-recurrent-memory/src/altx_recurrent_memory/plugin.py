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
        ),
        MemorySpec(
            "associative-recurrent-memory",
            summary="Memory tokens behind each segment write into a matrix of every block (ARMT)",
            description=(
                "x <- x + A phi(q) / z.phi(q) before a block; the tokens behind a segment write v to phi(k) after it,\n"
                "by the delta rule: A <- A + beta phi(k) (v - A phi(k) / z.phi(k))^T\n"
                "Each segment costs what the blocks cost for segment + tokens; sequential over segments.\n"
                "State: 2 key_dim order dim numbers for each block, and the blocks' own within one segment.\n"
                "Use it where recurrent-memory holds too little: for facts by the thousand in very long inputs."
            ),
            build="altx_recurrent_memory.associative:build",
            config="altx_recurrent_memory.config:AssociativeConfig",
            capabilities="altx_recurrent_memory.config:associative_capabilities",
            paper="Rodkin, Kuratov, Bulatov, Burtsev 2024, Associative Recurrent Memory Transformer, arXiv:2407.04841",
            attach=("tokens",),
            default_attach="tokens",
        ),
    ]
