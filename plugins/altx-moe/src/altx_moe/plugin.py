"""What altx-moe offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from altx import RouterSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def altx_routers() -> Iterable[RouterSpec]:
    return [
        RouterSpec(
            "topk",
            summary="Each token uses the k targets that score highest",
            description=(
                "y_t = sum over i in topk_i(p_t) of p_ti * target_i(x)_t,  p_t = softmax or sigmoid(W x_t)\n"
                "n D per token beside the k targets themselves, no state. Nothing is dropped.\n"
                "Balanced by the Switch loss (balance_weight) and, with bias_rate > 0, by DeepSeek-V3's bias\n"
                "that only picks. A token decides by itself, so it is the same in training and in decoding:\n"
                "the router for causal models, and for targets with a state (mixture of mixers)."
            ),
            build="altx_moe.topk:build",
            config="altx_moe.config:TopKConfig",
            capabilities="altx_moe.config:topk_capabilities",
            paper=(
                "Shazeer et al. 2017, arXiv:1701.06538; balance: Fedus et al. 2021, arXiv:2101.03961; "
                "z: Zoph et al. 2022, arXiv:2202.08906; bias: Wang et al. 2024, arXiv:2408.15664"
            ),
        ),
        RouterSpec(
            "expert-choice",
            summary="Each target uses the tokens of a row that score highest for it",
            description=(
                "target i gets the ceil(capacity_factor * tokens / n) tokens of a row with the highest p_ti\n"
                "n D per token beside the targets themselves, no state, no auxiliary loss.\n"
                "Perfectly balanced, but a token may get no target, or many.\n"
                "It compares a token with later ones: for encoders only."
            ),
            build="altx_moe.expert_choice:build",
            config="altx_moe.config:ExpertChoiceConfig",
            capabilities="altx_moe.config:expert_choice_capabilities",
            paper="Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368",
        ),
    ]
