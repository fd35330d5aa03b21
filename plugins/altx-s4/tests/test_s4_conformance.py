"""The laws of the contract, for each form of the mixers."""

from __future__ import annotations

from altx.testing import conformance

test_s4d = conformance("s4d")
test_s4d_inv = conformance("s4d", config={"init": "inv", "discretization": "bilinear", "state_size": 6, "lr": None})
test_s4d_bidirectional = conformance("s4d", config={"bidirectional": True, "init": "legs", "state_size": 4})
