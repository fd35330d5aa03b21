"""What altx-token-turing offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "token-turing",
            summary="Token Turing Machine: memory tokens that each frame is read with and summarised into",
            description=(
                "Z = learn([M; frame]),  O = transformer(Z),  M <- learn([M; frame; O]),  y_t = mix(x_t) O\n"
                "Frames in turn, each costs O((memory + frame + process) d) and a transformer over `process` tokens.\n"
                "State: memory + process tokens, and the open frame's, whatever the length.\n"
                "Use it for steps of many tokens, such as video. In a causal model a token hears the output of the\n"
                "frame before its own, in an encoder that of its own, which is the paper's."
            ),
            build="altx_token_turing.memory:build",
            config="altx_token_turing.config:TokenTuringConfig",
            capabilities="altx_token_turing.config:capabilities",
            paper="Ryoo et al. 2022, Token Turing Machines, arXiv:2211.09119",
            attach=("residual", "gate"),
            default_attach="residual",
        )
    ]
