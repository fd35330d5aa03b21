"""The contract, as generated from what the memory declares."""

from altx.testing import conformance

test_ntm = conformance("ntm", config={"slots": 8, "width": 4})
test_several_heads_that_write_first = conformance(
    "ntm",
    config={"slots": 8, "width": 4, "read_heads": 2, "write_heads": 2, "shift": 2, "order": "write-read"},
)
