"""The contract, as generated from what the memory declares."""

from altx.testing import conformance

test_hopfield = conformance("hopfield", config={"patterns": 6})
test_hopfield_updates = conformance(
    "hopfield", config={"patterns": 6, "heads": 2, "head_dim": 5, "updates": 3, "beta": 0.7, "separate_values": True}
)
test_hopfield_unbiased = conformance("hopfield", config={"patterns": 3, "heads": 4, "bias": False})
