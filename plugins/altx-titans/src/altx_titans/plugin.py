"""What altx-titans offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "titans",
            summary="Titans' long-term memory: a small network, trained while it is used",
            description=(
                "S <- eta S - theta grad |M(k) - v|^2,  W <- (1 - alpha) W + S;  the value is M(q)\n"
                "O(d f) per token and head, with C numbers more per pair of tokens in a chunk; chunks in turn,\n"
                "a chunk's tokens together, every token with weights of its own time.\n"
                "State: three times the network's weights (now, at the chunk's start, momentum), whatever the length.\n"
                "For what is far back and too much for a matrix; beside an attention that sees what is near."
            ),
            build="altx_titans.titans:build",
            config="altx_titans.config:TitansConfig",
            capabilities="altx_titans.config:capabilities",
            paper="Behrouz, Zhong, Mirrokni 2024, Titans: Learning to Memorize at Test Time, arXiv:2501.00663",
            attach=("residual", "gate", "context"),
            default_attach="residual",
            attach_note="`--attach gate` is Memory as a Gate of the paper; see README of altx-titans for `context`.",
        ),
        MemorySpec(
            "ttt",
            summary="TTT-Linear and TTT-MLP: a small network, trained on each mini-batch of tokens",
            description=(
                "W <- W - rate sum lr grad 1/2 |f(k) - v|^2 over a mini-batch,  f(x) = x + norm(x W + b);  value f(q)\n"
                "O(d^2) per token and head (layers: 2, with a hidden layer of 4 d: O(8 d^2)), and C numbers for each\n"
                "pair of tokens of a mini-batch; mini-batches in turn, their tokens together.\n"
                "State: twice the network's weights (at the mini-batch's start, and gradients), whatever the length.\n"
                "For long sequences, beside another mixer or in a slot of its own."
            ),
            build="altx_titans.ttt:build",
            config="altx_titans.config:TTTConfig",
            capabilities="altx_titans.config:ttt_capabilities",
            paper=(
                "Sun et al. 2024, Learning to (Learn at Test Time): RNNs with Expressive Hidden States, "
                "arXiv:2407.04620"
            ),
            attach=("residual", "gate", "context"),
            default_attach="residual",
        ),
    ]
