"""The memory keeps every promise: both forms of what stands after a segment, and bare tokens."""

from altx.testing import conformance

test_recurrent_memory = conformance("recurrent-memory")
test_learned = conformance(
    "recurrent-memory", config={"tokens": 2, "write": "learned", "position": True, "norm": "layer"}
)
test_bare = conformance("recurrent-memory", config={"tokens": 1, "norm": "none"})
test_associative = conformance("associative-recurrent-memory")
test_associative_plain = conformance(
    "associative-recurrent-memory", config={"tokens": 2, "key_dim": 3, "order": 1, "correction": False}
)
