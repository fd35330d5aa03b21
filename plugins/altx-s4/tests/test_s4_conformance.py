"""The laws of the contract, for each form of the mixers."""

from __future__ import annotations

from altx.testing import conformance

test_s4d = conformance("s4d")
test_s4d_inv = conformance("s4d", config={"init": "inv", "discretization": "bilinear", "state_size": 6, "lr": None})
test_s4d_bidirectional = conformance("s4d", config={"bidirectional": True, "init": "legs", "state_size": 4})
test_s4 = conformance("s4")
test_s4_shared = conformance("s4", config={"n_ssm": 2, "state_size": 6, "lr": None})
test_s4_bidirectional = conformance("s4", config={"bidirectional": True, "state_size": 4})
test_s5 = conformance("s5")
test_s5_bilinear = conformance(
    "s5",
    config={"state_size": 12, "blocks": 3, "discretization": "bilinear", "clip_eigs": True, "activation": "full_glu"},
)
test_s5_bidirectional = conformance(
    "s5", config={"bidirectional": True, "state_size": 8, "blocks": 1, "activation": "half_glu2"}
)
