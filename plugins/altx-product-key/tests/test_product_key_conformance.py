"""The contract, as generated from what the memories declare."""

from altx.testing import conformance

SMALL = {"keys": 8, "topk": 4, "heads": 2, "key_dim": 4}

test_product_key = conformance("product-key", config=SMALL)
test_product_key_relu = conformance("product-key", config={**SMALL, "weights": "relu", "query_norm": "none"})
test_memory_layer = conformance("memory-layer", config=SMALL)
test_memory_layer_own_values = conformance(
    "memory-layer", config={**SMALL, "share_values": False, "projection": "none"}
)
test_memory_layer_narrow = conformance(
    "memory-layer", config={**SMALL, "value_dim": 6, "projection": "linear", "output_gate": True}
)
