"""The contract, as generated from what the memory declares. Chunks of a few tokens, so that checks see many."""

from altx.testing import conformance

test_nsm = conformance("nsm", config={"slots": 6, "chunk": 3, "heads": 2, "living": 4})
test_tokens = conformance("nsm", config={"slots": 5, "chunk": 1, "k": 3, "width": 8, "balance_weight": 0.0})
test_token_to_state = conformance("token-to-state", config={"chunk": 3})
test_token_to_state_with_fixed_states = conformance("token-to-state", config={"chunk": None, "width": 8})
