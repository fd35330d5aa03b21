"""The contract, as generated from what the memories declare."""

from altx.testing import conformance

test_titans = conformance("titans")
test_titans_in_chunks = conformance("titans", config={"chunk": 4, "heads": 2, "expansion": 2.0, "order": "write-read"})
test_titans_with_a_matrix = conformance(
    "titans", config={"chunk": 3, "depth": 1, "heads": 1, "residual_norm": False, "momentum": False, "max_lr": 0.5}
)
test_ttt_linear = conformance("ttt")
test_ttt_mlp_in_chunks = conformance("ttt", config={"layers": 2, "chunk": 5, "heads": 2, "gate": True})
