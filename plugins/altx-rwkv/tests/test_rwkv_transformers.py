"""With the weights of an RWKV-4 of transformers, a composed model gives the same logits, whole and streamed.

Their first norm, `pre_ln`, sees nothing but the embedding of a token, so it is applied to the table of embeddings.
Their `rescale_every` halves the residual for float16 and gives the same numbers; it is off here.
"""

from __future__ import annotations

import pytest
import torch

from altx.compose import compose

transformers = pytest.importorskip("transformers")

VOCAB = 37
NAMES = {
    "rwkv.embeddings.": "input.", "rwkv.ln_out.": "norm.", "rwkv.blocks.": "body.inner.layers.",
    ".ln1.": ".layers.0.norm.", ".ln2.": ".layers.1.norm.", ".attention.": ".layers.0.body.",
    ".feed_forward.": ".layers.1.body.", "time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}  # fmt: skip


def translated(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of altx for the weights of transformers."""
    scale, bias = (theirs.pop(f"rwkv.blocks.0.pre_ln.{name}") for name in ("weight", "bias"))
    table = "rwkv.embeddings.weight"
    theirs[table] = torch.nn.functional.layer_norm(theirs[table], scale.shape, scale, bias)
    ours = {}
    for name, weight in theirs.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        ours[name] = weight
    return ours


@pytest.mark.parametrize(("dim", "layers", "hidden"), [(32, 3, None), (20, 2, 48)])
def test_logits_equal_those_of_transformers(dim, layers, hidden):
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=dim, num_hidden_layers=layers, intermediate_size=hidden, rescale_every=0,
        context_length=64,
    )  # fmt: skip
    theirs = transformers.RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    ours = compose(
        {
            "dim": dim, "layers": layers, "mixer": "rwkv4", "norm": "layer", "final_norm": "layer",
            "feed_forward": {"name": "rwkv4-channel", "hidden": hidden}, "norm_eps": config.layer_norm_epsilon,
            "input": {"kind": "tokens", "vocab": VOCAB}, "head": {"kind": "language-model", "tie": False},
        }
    ).eval()  # fmt: skip
    ours.load_state_dict(translated(dict(theirs.state_dict())))
    for length in (1, 2, 33, 64):
        tokens = torch.randint(VOCAB, (2, length))
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            assert expected.std() > 0.3
            torch.testing.assert_close(ours(tokens).y, expected, atol=1e-5, rtol=0)
            state, found = ours.init_state(2), []
            for token in tokens.split(1, 1):
                out = ours(token, state=state)
                found.append(out.y)
                state = out.state
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=0)
