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
            "s4",
            summary="S4: for each channel a linear filter that starts as a memory of all its past",
            description=(
                "h_t = A-bar h_{t-1} + B-bar x_t,  y_t = 2 Re(C h_t) + D x_t,  GLU(W gelu(y)), for each channel;\n"
                "A = diagonal - P P^* starts as HiPPO-LegS, whose state keeps its past as Legendre polynomials.\n"
                "Linear in T: 4 D^2 FLOPs of the output projection and 16 D N of recurrence per token.\n"
                "State: D N numbers per row however long the sequence, N = state_size.\n"
                "Use it for long, smooth signals and very long dependencies; s4d is simpler and nearly as good."
            ),
            build="altx_s4.s4:build",
            config="altx_s4.config:S4Config",
            capabilities="altx_s4.config:capabilities",
            paper="Gu, Goel & Re 2022, Efficiently Modeling Long Sequences with Structured State Spaces, "
            "arXiv:2111.00396",
        ),
        MixerSpec(
            "s4d",
            summary="S4D: for each channel a linear filter of decaying oscillations",
            description=(
                "h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) A^-1 x_t,  y_t = 2 Re(C h_t) + D x_t,  GLU(W gelu(y)).\n"
                "A is diagonal and complex: N / 2 decaying oscillations for every channel, the same at every token.\n"
                "Linear in T: 4 D^2 FLOPs of the output projection and 6.5 D N of recurrence per token.\n"
                "State: D N numbers per row however long the sequence, N = state_size.\n"
                "Use it for long, smooth signals such as audio; it selects nothing, so text wants mamba or attention."
            ),
            build="altx_s4.s4d:build",
            config="altx_s4.config:S4DConfig",
            capabilities="altx_s4.config:capabilities",
            paper="Gu, Gupta, Goel & Re 2022, On the Parameterization and Initialization of Diagonal State Space "
            "Models, arXiv:2206.11893",
        ),
        MixerSpec(
            "s5",
            summary="S5: one linear state space with many inputs and outputs",
            description=(
                "h_t = exp(dt L) h_{t-1} + (exp(dt L) - 1) L^-1 B x_t,  y_t = 2 Re(C h_t) + D x_t,  and a gate;\n"
                "one state for all channels, diagonal and complex, the same at every token.\n"
                "Linear in T: 4 D N + 2 D^2 FLOPs of matrices per token; the recurrence is next to nothing.\n"
                "State: N numbers per row however long the sequence, N = state_size.\n"
                "Use it as s4d, where the state should be small or shared by the channels."
            ),
            build="altx_s4.s5:build",
            config="altx_s4.config:S5Config",
            capabilities="altx_s4.config:capabilities",
            paper="Smith, Warrington & Linderman 2023, Simplified State Space Layers for Sequence Modeling, "
            "arXiv:2208.04933",
        ),
    ]
