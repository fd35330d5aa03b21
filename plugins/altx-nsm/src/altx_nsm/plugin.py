"""What altx-nsm offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, RouterSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "nsm",
            summary="Neural State Machine: states that tokens choose by content, and that talk to each other",
            description=(
                "a = top-k softmax(c cos(q_t, key_i)),  r_t = W_o sum a_ti s_i  from the states before the chunk;\n"
                "then key_i goes to the mean of q_t, s_i to GRU(mean of v_t, s_i), as far as they write, and states\n"
                "attend to each other. O(S W) per token and O(S W^2) per chunk of C tokens, sequential across chunks.\n"
                "State: 4 S W numbers per sequence, whatever the length. States that few tokens choose die, one that\n"
                "many choose is split in two. For what must be found again by kind, beside a mixer of local context."
            ),
            build="altx_nsm.memory:build",
            config="altx_nsm.config:NSMConfig",
            capabilities="altx_nsm.config:capabilities",
            paper=(
                "rebuilt from the idea of github.com/reicalasso/beyond_transformer, src/nsm at a5c21ee; parts from "
                "Locatello et al. 2020, arXiv:2006.15055 (weighted mean, GRU), and Goyal et al. 2019, arXiv:1909.10893 "
                "(top-k update, attention among states)"
            ),
            attach=("residual", "gate"),
            default_attach="residual",
        )
    ]


@hookimpl
def altx_routers() -> Iterable[RouterSpec]:
    return [
        RouterSpec(
            "token-to-state",
            summary="Each token uses the targets whose states it matches; the states follow what they are sent",
            description=(
                "a = top-k softmax(c cos(W x_t, s_i)), y_t = sum a_ti target_i(x)_t  by the states before the chunk;\n"
                "then s_i goes towards the mean over the chunk of the queries that chose it, as far as each says.\n"
                "The routing of the Neural State Machine without its reads: a target is known by what it was sent.\n"
                "O((D + n) W) per token, sequential across chunks. State: 2 n W numbers per sequence.\n"
                "With chunk null the states are learned and fixed: content-based routing without a state."
            ),
            build="altx_nsm.router:build",
            config="altx_nsm.config:TokenToStateConfig",
            capabilities="altx_nsm.config:token_to_state_capabilities",
            paper=(
                "rebuilt from the idea of github.com/reicalasso/beyond_transformer, src/nsm at a5c21ee; balance: Fedus "
                "et al. 2021, arXiv:2101.03961"
            ),
        )
    ]
