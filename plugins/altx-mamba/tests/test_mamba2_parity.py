"""With the weights of a Mamba-2 of transformers, a composed model gives the same logits, whole or in pieces."""

from __future__ import annotations

import pytest
import torch

from altx.compose import compose
from altx.context import Context

transformers = pytest.importorskip("transformers")

VOCAB, LAYERS, CHUNK = 37, 2, 16


def make_pair(groups: int, tie: bool):
    """Theirs, far from where it starts, and ours with the same weights."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=LAYERS, num_heads=8, head_dim=8,
        n_groups=groups, chunk_size=CHUNK, layer_norm_epsilon=1e-4, tie_word_embeddings=tie,
    )  # fmt: skip
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    mixer = {"name": "mamba2", "state_size": 8, "head_dim": 8, "n_groups": groups, "norm_eps": 1e-4}
    ours = compose(
        {
            "dim": 32,
            "layers": LAYERS,
            "mixer": [mixer],
            "feed_forward": "none",
            "input": {"kind": "tokens", "vocab": VOCAB},
            "head": {"kind": "language-model", "tie": tie},
            "norm_eps": 1e-4,
        }
    ).eval()
    ours.load_state_dict(translate(theirs.state_dict(), tie))
    return theirs, ours


def translate(theirs: dict[str, torch.Tensor], tie: bool) -> dict[str, torch.Tensor]:
    """Names of altx for the weights of transformers."""
    ours = {}
    for name, weight in theirs.items():
        if name == "lm_head.weight" and tie:
            continue
        # The norm of a block before that of its mixer, which has the same last name.
        if name.startswith("backbone.layers.") and ".mixer." not in name:
            name = name.replace(".norm.weight", ".layers.0.norm.weight")
        for old, new in (
            ("backbone.embeddings.", "input."),
            ("backbone.norm_f.", "norm."),
            ("backbone.layers.", "body.inner.layers."),
            (".mixer.", ".layers.0.body."),
            ("lm_head.", "head."),
        ):
            name = name.replace(old, new)
        ours[name] = weight
    return ours


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tie", [True, False])
def test_logits_equal_those_of_transformers(groups, tie):
    theirs, ours = make_pair(groups, tie)
    for length in (1, 2, 7, CHUNK, 33, 70):
        tokens = torch.randint(VOCAB, (2, length))
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            found = ours(tokens).y
        assert expected.std() > 0.3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 41, [17, 24], [20, 1, 0, 5, 15]])
def test_pieces_give_the_logits_that_transformers_gives_for_the_whole(pieces):
    theirs, ours = make_pair(2, tie=False)
    tokens = torch.randint(VOCAB, (2, 41))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        state, found = ours.init_state(2), []
        for piece in tokens.split(pieces, 1):
            out = ours(piece, state=state)
            state = out.state
            found.append(out.y)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=0)


def test_padding_on_the_left_changes_nothing_that_transformers_gives_without():
    theirs, ours = make_pair(1, tie=True)
    tokens = torch.randint(VOCAB, (2, 23))
    padded = torch.cat([torch.randint(VOCAB, (2, 6)), tokens], 1)
    mask = torch.arange(29) >= 6
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        found = ours(padded, Context(mask=mask.expand(2, -1))).y[:, 6:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
