"""With the weights of a Mamba or FalconMamba of transformers, a composed model gives the same logits."""

from __future__ import annotations

import pytest
import torch

from altx.compose import compose

transformers = pytest.importorskip("transformers")

VOCAB, LAYERS = 37, 2
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": LAYERS, "time_step_rank": 3}


def their_mamba(tie: bool):
    config = transformers.MambaConfig(**SIZES, layer_norm_epsilon=1e-4, use_bias=True, tie_word_embeddings=tie)
    return transformers.MambaForCausalLM(config), {"bias": True}


def their_falcon_mamba(tie: bool):
    config = transformers.FalconMambaConfig(
        **SIZES, layer_norm_epsilon=1e-4, mixer_rms_eps=1e-3, tie_word_embeddings=tie
    )
    return transformers.FalconMambaForCausalLM(config), {"inner_norm_eps": 1e-3}


def translate(theirs: dict[str, torch.Tensor], tie: bool) -> dict[str, torch.Tensor]:
    """Names of altx for the weights of transformers."""
    ours = {}
    for name, weight in theirs.items():
        if name == "lm_head.weight" and tie:
            continue
        for old, new in (
            ("backbone.embeddings.", "input."),
            ("backbone.norm_f.", "norm."),
            ("backbone.layers.", "body.inner.layers."),
            (".mixer.", ".layers.0.body."),
            ("lm_head.", "head."),
        ):
            name = name.replace(old, new)
        if ".layers." in name and name.endswith(".norm.weight"):
            name = name.replace(".norm.weight", ".layers.0.norm.weight")
        ours[name] = weight
    return ours


@pytest.mark.parametrize("make", [their_mamba, their_falcon_mamba])
@pytest.mark.parametrize("tie", [True, False])
def test_logits_equal_those_of_transformers(make, tie):
    torch.manual_seed(0)
    theirs, settings = make(tie)
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours = compose(
        {
            "dim": 32,
            "layers": LAYERS,
            "mixer": [{"name": "mamba", "state_size": 8, "dt_rank": 3, **settings}],
            "feed_forward": "none",
            "input": {"kind": "tokens", "vocab": VOCAB},
            "head": {"kind": "language-model", "tie": tie},
            "norm_eps": 1e-4,
        }
    ).eval()
    ours.load_state_dict(translate(theirs.state_dict(), tie))
    for length in (1, 2, 7, 33, 70):
        tokens = torch.randint(VOCAB, (2, length))
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            found = ours(tokens).y
        assert expected.std() > 0.3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
