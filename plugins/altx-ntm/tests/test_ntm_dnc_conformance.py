"""The contract of `dnc`, as generated from what the memory declares."""

from altx.testing import conformance

test_dnc = conformance("dnc", config={"slots": 8, "width": 4})
test_one_head = conformance("dnc", config={"slots": 5, "width": 3, "read_heads": 1})
