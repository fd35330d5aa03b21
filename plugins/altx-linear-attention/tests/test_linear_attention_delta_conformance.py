"""The laws of the contract, for each form of the mixers with a delta rule."""

from __future__ import annotations

from altx.testing import conformance

test_deltanet = conformance("deltanet")
test_deltanet_of_2021 = conformance(
    "deltanet",
    config={
        "heads": 2, "expand_k": 0.5, "expand_v": 1.5, "qk_activation": "elu", "qk_norm": "sum", "output_gate": True,
        "short_conv": False,
    },
)  # fmt: skip
test_gated_deltanet = conformance("gated-deltanet")
test_gated_deltanet_with_grouped_values = conformance(
    "gated-deltanet",
    config={
        "heads": 2, "head_dim": 4, "value_heads": 4, "expand_v": 1.5, "output_gate": False, "conv_kernel": 1,
        "conv_bias": True, "allow_neg_eigval": True,
    },
)  # fmt: skip
test_kda = conformance("kda")
test_kda_with_other_heads = conformance(
    "kda", config={"heads": 3, "head_dim": 4, "gate_bias": True, "conv_kernel": 2, "allow_neg_eigval": True}
)
