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
            "s4d",
            summary="S4D: for each channel a linear filter of decaying oscillations",
            description=(
                "h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) A^-1 x_t,  y_t = 2 Re(C h_t) + D x_t,  W gelu(y) through a GLU.\n"
                "A is diagonal and complex: N / 2 decaying oscillations for every channel, the same at every token.\n"
                "Linear in T: 4 D^2 FLOPs of the output projection and 6.5 D N of recurrence per token.\n"
                "State: D N numbers per row however long the sequence, N = state_size.\n"
                "Use it for long, smooth signals such as audio; it selects nothing, so text wants mamba or attention."
            ),
            build="altx_s4.s4d:build",
            config="altx_s4.config:S4DConfig",
            capabilities="altx_s4.config:capabilities",
            paper="Gu, Gupta, Goel & Re 2022, On the Parameterization and Initialization of Diagonal State Space Models, "
            "arXiv:2206.11893",
        ),
    ]
