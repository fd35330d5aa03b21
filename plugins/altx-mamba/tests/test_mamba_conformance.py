"""The laws of the contract, for each form of the mixer."""

from __future__ import annotations

from altx.testing import conformance

test_mamba = conformance("mamba")
test_mamba_with_inner_norm = conformance(
    "mamba", config={"inner_norm_eps": 1e-6, "bias": True, "conv_bias": False, "conv_kernel": 2, "dt_rank": 3}
)
test_mamba2 = conformance("mamba2")
test_mamba2_with_groups = conformance(
    "mamba2", config={"head_dim": 4, "state_size": 6, "n_groups": 2, "bias": True, "conv_bias": False, "dt_upper": 0.5}
)
test_mamba3 = conformance("mamba3")
test_mamba3_with_groups = conformance(
    "mamba3",
    config={
        "head_dim": 4, "state_size": 6, "n_groups": 2, "rope": "full", "decay": "heavy-tail", "out_norm": True
    },
)  # fmt: skip
