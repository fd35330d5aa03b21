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
            "mamba",
            summary="Mamba-1: a selective state-space model behind a short convolution",
            description=(
                "h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = (C_t h_t + D x_t) * silu(z_t), in E channels;\n"
                "dt, B and C are computed from x_t, so each token decides what is kept: a gate, not a filter.\n"
                "Linear in T: 6 D E FLOPs of projections and 9 E N of recurrence per token.\n"
                "State: E N + (K - 1) E numbers per row however long the sequence, N = state_size, K = conv_kernel.\n"
                "Use it as the workhorse of a long-context or streaming model; add some attention for exact recall."
            ),
            build="altx_mamba.mixer:build",
            config="altx_mamba.config:MambaConfig",
            capabilities="altx_mamba.config:capabilities",
            paper="Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv:2312.00752",
        ),
        MixerSpec(
            "mamba2",
            summary="Mamba-2: a state space with one decay per head behind a short convolution",
            description=(
                "h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T,  y_t = norm((C_t h_t + D x_t) * silu(z_t)), in heads\n"
                "of width P; A is one number per head, which lets whole chunks be computed as matrix products.\n"
                "Linear in T: 6 D E FLOPs of projections and 5 E N of recurrence per token.\n"
                "State: E N + (K - 1)(E + 2 G N) numbers per row however long the sequence; by default N,\n"
                "state_size, is 8 times that of mamba. Use it where mamba's state is too small for recall."
            ),
            build="altx_mamba.mamba2:build",
            config="altx_mamba.mamba2_config:Mamba2Config",
            capabilities="altx_mamba.mamba2_config:capabilities",
            paper="Dao & Gu 2024, Transformers are SSMs (structured state space duality), arXiv:2405.21060",
        ),
        MixerSpec(
            "mamba3",
            summary="Mamba-3: a state space whose state rotates, discretised by a trapezoid, without a convolution",
            description=(
                "h_t = a_t h_{t-1} + (1 - l_t) dt_t a_t k_{t-1} x_{t-1}^T + l_t dt_t k_t x_t^T,  a_t = exp(dt_t A_t),\n"
                "y_t = (h_t^T q_t + D x_t) * silu(z_t), in heads of width P. k and q are B and C, normed, biased and\n"
                "rotated by angles that add up over the tokens: a complex decay, which can keep parity.\n"
                "The weight l_t of the trapezoid takes the place of Mamba-2's convolution.\n"
                "Linear in T: 6 D E FLOPs of projections and 5 E N of recurrence per token, E inner width.\n"
                "State: E N + H (N + P + R) numbers per row however long the sequence, N = state_size, R angles.\n"
                "One input and one output per head (SISO); the form with several (MIMO) is not here."
            ),
            build="altx_mamba.mamba3:build",
            config="altx_mamba.mamba3_config:Mamba3Config",
            capabilities="altx_mamba.mamba3_config:capabilities",
            paper="Lahoti et al. 2026, Mamba-3: Improved Sequence Modeling (state space principles), arXiv:2603.15569",
        ),
    ]
