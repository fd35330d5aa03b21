"""What altx-infini offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import MemorySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "infini",
            summary="Infini-attention: a matrix per head holds all finished segments, beside local attention",
            description=(
                "A = sigmoid(b) s(q) M / s(q) z + (1 - sigmoid(b)) local,  M += s(k)^T v,  z += s(k),  s = elu + 1\n"
                "O(d^2) per token and head, all tokens of a segment together, segments in turn.\n"
                "State: twice a d x d matrix per head (all finished segments, the open one), whatever the length.\n"
                "Use it with attention of a window, to carry what it no longer sees; a matrix blurs what it holds,\n"
                "so where exact recall matters, a store (knn) is better."
            ),
            build="altx_infini.memory:build",
            config="altx_infini.config:InfiniConfig",
            capabilities="altx_infini.config:capabilities",
            paper="Munkhdalai, Faruqui, Gopal 2024, Leave No Context Behind: Efficient Infinite Context Transformers "
            "with Infini-attention, arXiv:2404.07143",
            attach=("residual", "gate", "kv"),
            default_attach="residual",
            attach_note="`--attach kv` is the paper's form: it has the attention's own q, k and v.",
        )
    ]
