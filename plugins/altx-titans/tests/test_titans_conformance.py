"""The contract, as generated from what the memories declare."""

from altx.testing import conformance

test_titans = conformance("titans")
test_in_chunks = conformance("titans", config={"chunk": 4, "heads": 2, "expansion": 2.0})
test_write_first = conformance("titans", config={"chunk": 5, "heads": 2, "expansion": 2.0, "order": "write-read"})
test_matrix = conformance("titans", config={"chunk": 4, "depth": 1, "residual_norm": False, "momentum": False})
test_one_head = conformance(
    "titans", config={"chunk": 3, "heads": 1, "head_dim": 16, "qk_norm": "none", "activation": "none", "max_lr": 0.1}
)
