"""The contract's own checks."""

from __future__ import annotations

from altx.testing import conformance

test_performer = conformance("performer")
test_performer_relu = conformance("performer", config={"kernel": "relu", "heads": 2, "features": 20})
test_performer_biases = conformance(
    "performer", config={"qkv_bias": True, "out_bias": False, "feature_norm": "constant", "redraw_interval": 2}
)
