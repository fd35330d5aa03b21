"""The contract, as generated from what the memory declares."""

from altx.testing import conformance

SMALL = {"segment": 4, "memory": 4, "compressed": 3, "ratio": 2}

test_compressive = conformance("compressive", config={**SMALL})
test_compressive_means = conformance("compressive", config={**SMALL, "compression": "mean", "shown": "all"})
test_compressive_maxima_without_a_queue = conformance(
    "compressive", config={"segment": 3, "memory": 0, "compressed": 2, "ratio": 3, "compression": "max"}
)
test_compressive_without_a_loss = conformance(
    "compressive", config={"segment": 2, "memory": 4, "compressed": 4, "ratio": 1, "reconstruction_weight": 0.0}
)
test_compressive_by_default = conformance("compressive")
