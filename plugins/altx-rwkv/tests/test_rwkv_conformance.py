"""The laws of the contract, for each version's time and channel mixing."""

from __future__ import annotations

from altx.testing import conformance

test_rwkv4 = conformance("rwkv4")
test_rwkv4_channel = conformance("rwkv4-channel", config={"hidden": 24})
