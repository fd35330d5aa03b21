"""The contract's own checks."""

from __future__ import annotations

from altx.testing import conformance

test_linformer = conformance("linformer", config={"max_len": 24, "k": 6})
test_linformer_defaults = conformance("linformer")
test_linformer_shared = conformance("linformer", config={"max_len": 32, "k": 5, "sharing": "key-value", "head_dim": 3})
test_linformer_unshared = conformance("linformer", config={"max_len": 32, "k": 5, "sharing": "none", "heads": 2})
test_linformer_one_head = conformance(
    "linformer", config={"max_len": 32, "k": 40, "one_kv_head": True, "share_kv": True, "heads": 4}
)
