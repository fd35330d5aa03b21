"""With the same weights, attention is Llama's, and a composed model is Llama."""

from __future__ import annotations

import re

import pytest
import torch
from altx_attention.attention import build
from altx_attention.config import AttentionConfig

from altx.compose import compose
from altx.spec import BuildContext

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

LLAMA = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="sdpa",
)  # fmt: skip

NAMES = {
    "model.embed_tokens": "input",
    "model.norm": "norm",
    "lm_head": "head",
    "input_layernorm": "layers.0.norm",
    "self_attn": "layers.0.body",
    "post_attention_layernorm": "layers.1.norm",
    "mlp.gate_proj": "layers.1.body.gate",
    "mlp.up_proj": "layers.1.body.up",
    "mlp.down_proj": "layers.1.body.down",
    "model.layers": "body.inner.layers",
}


@torch.no_grad()
def test_in_float64_it_is_llamas_attention() -> None:
    torch.manual_seed(0)
    theirs = LlamaAttention(LlamaConfig(**LLAMA), layer_idx=0).double()
    ours = build(AttentionConfig(heads=4, kv_heads=2), BuildContext(dim=32)).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    # Given from here, because Llama's own rotary module computes in float32.
    angle = torch.arange(11.0, dtype=torch.float64)[:, None] / 10000.0 ** (torch.arange(4).double() / 4)
    table = angle.repeat(1, 2)[None]
    expected = theirs(x, position_embeddings=(table.cos(), table.sin()), attention_mask=None)[0]
    torch.testing.assert_close(ours(x).y, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_composed_model_is_llama() -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    ours = compose(
        {
            "dim": 32,
            "input": {"kind": "tokens", "vocab": 50},
            "head": {"kind": "language-model", "tie": False},
            "mixer": [{"name": "attention", "heads": 4, "kv_heads": 2}],
            "feed_forward": [{"name": "swiglu", "hidden": 48}],
            "layers": 2,
        }
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    ours.load_state_dict({renamed(name): weight for name, weight in theirs.state_dict().items()})
    tokens = torch.randint(0, 50, (3, 17))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens).y, expected, atol=1e-5, rtol=1e-5)


def renamed(name: str) -> str:
    """Llama's name of a weight as a composed model's."""
    for theirs, ours in NAMES.items():
        name = re.sub(rf"\b{re.escape(theirs)}\b", ours, name)
    return name
