"""The contract's own checks."""

from __future__ import annotations

from altx.testing import conformance

test_attention = conformance("attention")
test_attention_grouped = conformance("attention", config={"heads": 4, "kv_heads": 2, "bias": True})
test_attention_window = conformance("attention", config={"window": 4})
