"""What altx-ntm offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "ntm",
            summary="Neural Turing Machine: slots addressed by content and by location",
            description=(
                "M <- M * (1 - w e^T) + w a^T,  r = w M;  w from content, then moved by a learned shift\n"
                "O(N W) per token and head, sequential in T (each address depends on the one before);\n"
                "the heads' parameters are computed for all tokens at once.\n"
                "State: N W numbers and N per head, whatever the length.\n"
                "For algorithmic tasks (copy, recall, sort) and as a small exact store beside another mixer."
            ),
            build="altx_ntm.memory:build",
            config="altx_ntm.config:NTMConfig",
            capabilities="altx_ntm.config:capabilities",
            paper=(
                "Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv:1410.5401; "
                "stabilised as in Collier & Beel 2018, arXiv:1807.08518"
            ),
            attach=("residual", "gate", "controller"),
            default_attach="residual",
            attach_note=(
                "`--attach controller` is the form of the 2014 paper: the mixer hears what was read, sequential in T."
            ),
        ),
        MemorySpec(
            "dnc",
            summary="Differentiable Neural Computer: slots found by content, by being free, and by order of writing",
            description=(
                "w_w = g_w (g_a allocation + (1 - g_a) content), M <- M * (1 - w_w e^T) + w_w v^T;\n"
                "w_r = pi_1 L^T w_r + pi_2 content + pi_3 L w_r, r = w_r M;  L links slots as they were written\n"
                "O(N^2 + N W) per token and read head, sequential in T; heads' parameters for all tokens at once.\n"
                "State: N^2 + N W numbers and N per head, whatever the length.\n"
                "For tasks that store many things and go through them in order: lists, graphs, several copies."
            ),
            build="altx_ntm.dnc:build",
            config="altx_ntm.config:DNCConfig",
            capabilities="altx_ntm.config:dnc_capabilities",
            paper=(
                "Graves, Wayne, Reynolds et al. 2016, Hybrid computing using a neural network with dynamic external "
                "memory, Nature 538, doi:10.1038/nature20101"
            ),
            attach=("residual", "gate", "controller"),
            default_attach="residual",
            attach_note=(
                "`--attach controller` is the form of the 2016 paper: the mixer hears what was read, sequential in T."
            ),
        ),
    ]
