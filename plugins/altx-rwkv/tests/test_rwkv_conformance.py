"""The laws of the contract, for each version's time and channel mixing."""

from __future__ import annotations

from altx.testing import conformance

test_rwkv4 = conformance("rwkv4")
test_rwkv4_channel = conformance("rwkv4-channel", config={"hidden": 24})
test_rwkv5 = conformance("rwkv5", config={"head_dim": 4})
test_rwkv5_channel = conformance("rwkv5-channel")
test_rwkv6 = conformance("rwkv6", config={"head_dim": 8, "mix_rank": 3, "decay_rank": 5})
test_rwkv6_channel = conformance("rwkv6-channel")
test_rwkv7 = conformance("rwkv7", config={"head_dim": 8, "gate_rank": 3})
test_rwkv7_channel = conformance("rwkv7-channel")
