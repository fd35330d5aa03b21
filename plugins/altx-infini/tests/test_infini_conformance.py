"""The contract, as generated from what the memory declares."""

from altx.testing import conformance

test_infini = conformance("infini")
test_infini_in_short_segments = conformance("infini", config={"segment": 3})
test_infini_delta = conformance("infini", config={"segment": 4, "update": "delta", "heads": 2, "gate": -1.0})
test_infini_token_by_token = conformance("infini", config={"segment": 1, "update": "delta"})
