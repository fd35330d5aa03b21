"""The laws of the contract, for each form of the linear recurrences."""

from __future__ import annotations

from altx.testing import conformance

test_linear_attention = conformance("linear-attention")
test_linear_attention_exp = conformance(
    "linear-attention", config={"feature_map": "exp", "bias": False, "out_bias": False, "heads": 2}
)
test_gla = conformance("gla")
test_gla_with_convolutions = conformance(
    "gla", config={"short_conv": True, "conv_bias": True, "conv_kernel": 3, "gate_min": -1.0, "output_gate": False}
)
test_retnet = conformance("retnet")
test_lightning = conformance("lightning")
test_hgrn2 = conformance("hgrn2")
test_hgrn2_with_convolutions = conformance(
    "hgrn2", config={"short_conv": True, "conv_bias": True, "conv_kernel": 3, "expand_ratio": 4, "lower_bound": False}
)
test_mlstm = conformance("mlstm")
test_mlstm_projected_up = conformance("mlstm", config={"block": "pre-up", "proj_factor": 1.0})
