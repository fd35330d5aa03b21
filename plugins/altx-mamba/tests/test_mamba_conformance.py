"""The laws of the contract, for each form of the mixer."""

from __future__ import annotations

from altx.testing import conformance

test_mamba = conformance("mamba")
test_mamba_with_inner_norm = conformance(
    "mamba", config={"inner_norm_eps": 1e-6, "bias": True, "conv_bias": False, "conv_kernel": 2, "dt_rank": 3}
)
