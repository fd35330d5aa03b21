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
            "performer",
            summary="Performer (FAVOR+): softmax attention estimated by positive orthogonal random features",
            description=(
                "y_t = sum_j f(q_t).f(k_j) v_j / sum_j f(q_t).f(k_j), j <= t; f(x) = exp(W x - |x|^2 / 2), W random,\n"
                "  orthogonal, and drawn anew every redraw_interval optimizer steps: E[f(q).f(k)] = exp(q.k)\n"
                "Linear in T: 4 features (head_dim + 1) FLOPs per token and head, beside the feature products.\n"
                "State: heads features (head_dim + 2) numbers, and the features themselves; it never grows.\n"
                "Use it in place of softmax attention where sequences are too long for that, also in encoders."
            ),
            build="altx_performer.performer:build",
            config="altx_performer.config:PerformerConfig",
            capabilities="altx_performer.config:capabilities",
            paper="Choromanski et al. 2020, Rethinking Attention with Performers, arXiv:2009.14794",
        )
    ]
