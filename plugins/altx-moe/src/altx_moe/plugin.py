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
        RouterSpec(
            "switch",
            summary="Each token uses one target, which takes only so many",
            description=(
                "y_t = p_ti * target_i(x)_t with i = argmax p_t,  p_t = softmax(W x_t)\n"
                "In training a target takes the first capacity_factor L / n tokens of a row of L, and the rest has\n"
                "no target; otherwise it takes all. n D per token beside one target, no state.\n"
                "The cheapest sparse layer; with capacity_factor null nothing is ever dropped."
            ),
            build="altx_moe.switch:build",
            config="altx_moe.config:SwitchConfig",
            capabilities="altx_moe.config:switch_capabilities",
            paper="Fedus et al. 2021, Switch Transformers, arXiv:2101.03961",
        ),
        RouterSpec(
            "sinkhorn",
            summary="Each token uses k targets, which are made equally popular in training",
            description=(
                "targets: topk_i of S_ti in training, of W x_t otherwise;  S = Sinkhorn(exp(W x)) over the batch\n"
                "weights: sigmoid(W x_t) for k 1, softmax(W x_t) for more. No auxiliary loss.\n"
                "32 n per token beside the gate, no state. What was balanced in training need not be so afterwards."
            ),
            build="altx_moe.sinkhorn:build",
            config="altx_moe.config:SinkhornConfig",
            capabilities="altx_moe.config:batch_capabilities",
            paper="Clark et al. 2022, Unified Scaling Laws for Routed Language Models, arXiv:2202.01169",
        ),
        RouterSpec(
            "base",
            summary="Each token uses one target, by the best balanced assignment in training",
            description=(
                "y_t = sigmoid(w_i x_t) * target_i(x)_t;  in training i maximises the sum of w_i x_t over the batch\n"
                "when no target gets more than its share; otherwise i = argmax. No auxiliary loss.\n"
                "The auction takes many short rounds and waits for the device in each. No state."
            ),
            build="altx_moe.base:build",
            config="altx_moe.config:BaseConfig",
            capabilities="altx_moe.config:batch_capabilities",
            paper="Lewis et al. 2021, BASE Layers, arXiv:2103.16716",
        ),
        RouterSpec(
            "hash",
            summary="The token's number decides: nothing to train, nothing to balance",
            description=(
                "y_t = 1/k * sum over the k targets that a fixed random hash gives the token's number\n"
                "Some hashing per token, no parameters, no state, no losses. Needs tokens as input.\n"
                "The baseline that a learned router has to beat."
            ),
            build="altx_moe.hashing:build",
            config="altx_moe.config:HashConfig",
            capabilities="altx_moe.config:hash_capabilities",
            paper="Roller et al. 2021, Hash Layers for Large Sparse Models, arXiv:2106.04426",
        ),
        RouterSpec(
            "soft",
            summary="Each target gets mixtures of a row's tokens: no choice, no drop, no balance to keep",
            description=(
                "slot j of a target f: sum_t D_tj x_t, D = softmax over tokens of X Phi;  y_t = sum_j C_tj f(slot_j)\n"
                "with C = softmax over slots. 4 n S D per token beside n S slots of a target's work in each row.\n"
                "Fully differentiable. Mixes all tokens: for encoders only, and feed-forwards as targets."
            ),
            build="altx_moe.soft:build",
            config="altx_moe.config:SoftConfig",
            capabilities="altx_moe.config:soft_capabilities",
            paper="Puigcerver et al. 2023, From Sparse to Soft Mixtures of Experts, arXiv:2308.00951",
        ),
        RouterSpec(
            "mixture-of-depths",
            summary="A target works on the tokens that need it, the others pass it by",
            description=(
                "y_t = r_t target(x)_t for the capacity * L tokens of a row with the highest r_t = w x_t, else 0\n"
                "In a causal model after training a predictor picks: the gate's sign, or a small network.\n"
                "D per token beside a fraction of the target's work, no state of its own.\n"
                "One target, e.g. an attention layer, for what most tokens can do without."
            ),
            build="altx_moe.depths:build",
            config="altx_moe.config:DepthsConfig",
            capabilities="altx_moe.config:depths_capabilities",
            paper="Raposo et al. 2024, Mixture-of-Depths, arXiv:2404.02258",
        ),
        RouterSpec(
            "mixture-of-recursions",
            summary="One stack of layers, applied more often to the tokens that need it",
            description=(
                "h <- h + 0.1 sigmoid(w_r h) stack(h) for the tokens that score highest at depth r, a part of those\n"
                "of the depth before; in a causal model after training a predictor picks. Or with choice token\n"
                "y_t = p_ti stack^i(x)_t, i = argmax p_t, p = softmax(W x_t), the same in training and in a stream.\n"
                "D per token and depth beside the stack's work. Tokens that left are not seen deeper, nor cached.\n"
                "Targets: [{depths: 3, sublayers: [{mixer: attention}, {feed_forward: swiglu}]}]."
            ),
            build="altx_moe.recursions:build",
            config="altx_moe.config:RecursionsConfig",
            capabilities="altx_moe.config:recursions_capabilities",
            paper="Bae et al. 2025, Mixture-of-Recursions, arXiv:2507.10524",
        ),
    ]
