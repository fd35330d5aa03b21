"""The contract's own checks."""

from __future__ import annotations

from altx.testing import conformance

test_reformer = conformance("reformer")
test_reformer_overfull_buckets = conformance(
    "reformer", config={"heads": 2, "bucket_size": 2, "num_buckets": [2, 2], "n_hashes": 3, "rotary": False}
)
test_reformer_published_chunks = conformance(
    "reformer",
    config={
        "heads": 2, "bucket_size": 4, "num_buckets": 4, "n_hashes": 3, "chunking": "published",
        "attend_across_buckets": False, "norm_eps": 1e-6, "scale": 1.0, "out_bias": False, "rotations_per_head": False,
    },
)  # fmt: skip
test_reformer_local = conformance("reformer-local")
test_reformer_local_short_chunks = conformance(
    "reformer-local", config={"heads": 2, "chunk_size": 3, "before": 2, "rotary": False, "out_bias": False}
)
