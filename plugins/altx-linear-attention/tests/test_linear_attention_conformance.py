"""The laws of the contract, for each form of the linear recurrences."""

from __future__ import annotations

from altx.testing import conformance

test_linear_attention = conformance("linear-attention")
test_linear_attention_exp = conformance(
    "linear-attention", config={"feature_map": "exp", "bias": False, "out_bias": False, "heads": 2}
)
test_linear_attention_relu = conformance("linear-attention", config={"feature_map": "relu", "heads": 1})
test_gla = conformance("gla")
test_gla_with_convolutions = conformance(
    "gla", config={"short_conv": True, "conv_bias": True, "conv_kernel": 3, "gate_min": -1.0, "output_gate": False}
)
