"""What this distribution offers to altx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx.hookspecs import hookimpl
from altx.spec import MixerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            "linformer",
            summary="Linformer: softmax attention to k learned mixtures of the tokens, for encoders",
            description=(
                "y = softmax(Q (E^T K)^T / sqrt(head_dim)) F^T V per head; E and F (max_len, k) are learned, with\n"
                "  a row for each place in the sequence; a shorter sequence uses the first rows\n"
                "Linear in T: 4 k head_dim FLOPs per token and head for attention, 2 k dim for each of E and F.\n"
                "No state: every output depends on the whole sequence, so it is for encoders (causal: false) only.\n"
                "Use it where sequences have one known greatest length, such as classification of documents or images."
            ),
            build="altx_linformer.linformer:build",
            config="altx_linformer.config:LinformerConfig",
            capabilities="altx_linformer.config:capabilities",
            paper="Wang et al. 2020, Linformer: Self-Attention with Linear Complexity, arXiv:2006.04768",
        )
    ]
