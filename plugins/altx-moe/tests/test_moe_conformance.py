"""The contract, as generated from what the routers declare."""

from altx.testing import conformance

test_topk = conformance("topk")
test_topk_sigmoid_with_bias = conformance("topk", config={"score": "sigmoid", "bias_rate": 0.001})
test_expert_choice = conformance("expert-choice")
