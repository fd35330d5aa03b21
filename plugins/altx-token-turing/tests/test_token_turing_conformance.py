"""The contract, as generated from what the memory declares."""

from altx.testing import conformance

test_token_turing = conformance("token-turing")
test_token_turing_in_small_frames = conformance(
    "token-turing", config={"frame": 4, "memory": 3, "process": 2, "layers": 2, "heads": 2, "bottleneck": 5}
)
test_token_turing_of_one_token_frames = conformance("token-turing", config={"frame": 1, "memory": 2, "process": 1})
