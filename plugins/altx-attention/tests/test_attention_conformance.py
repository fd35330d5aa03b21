"""The contract's own checks."""

from __future__ import annotations

from altx.testing import conformance

test_attention = conformance("attention")
test_attention_grouped = conformance("attention", config={"heads": 4, "kv_heads": 2, "bias": True})
test_attention_window = conformance("attention", config={"window": 4})
test_attention_capped = conformance(
    "attention", config={"softcap": 2.0, "scale": 0.4, "qk_norm": "head", "gate": True, "rotary_fraction": 0.5}
)
test_attention_sinks = conformance(
    "attention", config={"sinks": True, "bias": True, "window": 5, "kv_heads": 2, "qk_norm": "width"}
)
test_attention_without_positions = conformance("attention", config={"rotary": False, "sinks": True})
test_mla = conformance("mla")
test_mla_wide = conformance(
    "mla", config={"q_lora_rank": 6, "kv_lora_rank": 12, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "bias": True}
)
test_mla_without_positions = conformance("mla", config={"rotary": False})
