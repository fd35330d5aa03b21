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
test_retnet = conformance("retnet")
test_retnet_narrow = conformance("retnet", config={"heads": 4, "expand_v": 1.0, "norm_eps": 1e-5})
test_lightning = conformance("lightning")
test_lightning_with_narrow_heads = conformance("lightning", config={"heads": 3, "head_dim": 4})
test_hgrn2 = conformance("hgrn2")
test_hgrn2_with_convolutions = conformance(
    "hgrn2", config={"short_conv": True, "conv_bias": True, "conv_kernel": 3, "expand_ratio": 4, "lower_bound": False}
)
test_mlstm = conformance("mlstm")
test_mlstm_without_cap = conformance(
    "mlstm", config={"heads": 2, "qk_dim_factor": 1.0, "v_dim_factor": 2.0, "gate_soft_cap": None, "bias": True}
)
test_mlstm_projected_up = conformance("mlstm", config={"block": "pre-up", "proj_factor": 1.0})
