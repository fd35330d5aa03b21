"""The contract, as generated from what the routers declare."""

from altx.testing import conformance

test_topk = conformance("topk")
test_topk_of_deepseek_v3 = conformance(
    "topk", config={"score": "sigmoid", "bias_rate": 0.001, "shared": 1, "scale": 2.5}
)
test_switch = conformance("switch")
test_expert_choice = conformance("expert-choice")
test_sinkhorn = conformance("sinkhorn")
test_base = conformance("base")
test_hash = conformance("hash")
test_soft = conformance("soft")
test_mixture_of_depths = conformance("mixture-of-depths", config={"capacity": 0.5})
test_mixture_of_recursions = conformance("mixture-of-recursions")
test_mixture_of_recursions_by_token = conformance("mixture-of-recursions", config={"choice": "token"})
