"""With the weights of a layer of transformers, attention and mla compute what that layer does, at once and streaming.

Rotation tables are given to those layers from here, because their own rotary modules compute in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from altx.layer import Layer
from altx.testing.case import difference

pytest.importorskip("transformers")

from altx_attention import attention, mla
from altx_attention.config import AttentionConfig
from altx_attention.mla_config import LatentAttentionConfig
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention
from transformers.models.olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.phi import PhiConfig
from transformers.models.phi.modeling_phi import PhiAttention
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

from altx.spec import BuildContext

TOKENS = 19


@dataclass
class Peer:
    """A layer of transformers and our settings for it.

    Args:
        layer: its class.
        config: its config's class.
        theirs: settings beside sizes.
        ours: settings beside sizes.
        rotated: features of a head that are rotated; 0: it wants no table.
        window: how far a token sees, which its mask has to say.
        plus_one: its norms multiply by 1 + weight.
        renamed: our names of its weights where they differ.
        mla: whether ours is that of mla.
    """

    layer: type
    config: type
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    rotated: int = 8
    window: int | None = None
    plus_one: bool = False
    renamed: dict[str, str] = field(default_factory=dict)
    mla: bool = False


LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
PEERS = {
    "qwen3": Peer(Qwen3Attention, Qwen3Config, ours={"qk_norm": "head"}),
    "olmo2": Peer(Olmo2Attention, Olmo2Config, ours={"qk_norm": "width", "norm_eps": 1e-5}),
    "gemma2": Peer(
        Gemma2Attention,
        Gemma2Config,
        {"query_pre_attn_scalar": 11, "attn_logit_softcapping": 1.5, "layer_types": ["full_attention"]},
        {"scale": 11**-0.5, "softcap": 1.5},
    ),
    "gemma2, sliding": Peer(
        Gemma2Attention,
        Gemma2Config,
        {"attn_logit_softcapping": 2.0, "sliding_window": 5, "layer_types": ["sliding_attention"]},
        {"scale": 256**-0.5, "softcap": 2.0, "window": 5},
        window=5,
    ),
    "gemma3": Peer(
        Gemma3Attention,
        Gemma3TextConfig,
        {"query_pre_attn_scalar": 7, "layer_types": ["full_attention"]},
        {"scale": 7**-0.5, "qk_norm": "head"},
        plus_one=True,
    ),
    "gpt-oss": Peer(
        GptOssAttention,
        GptOssConfig,
        {"layer_types": ["full_attention"], "attention_bias": True},
        {"sinks": True, "bias": True},
    ),
    "gpt-oss, sliding": Peer(
        GptOssAttention,
        GptOssConfig,
        {"layer_types": ["sliding_attention"], "sliding_window": 6, "attention_bias": True},
        {"sinks": True, "bias": True, "window": 6},
        window=6,
    ),
    "qwen3-next": Peer(
        Qwen3NextAttention,
        Qwen3NextConfig,
        {},
        {"gate": True, "qk_norm": "head", "rotary_fraction": 0.5},
        rotated=4,
        plus_one=True,
    ),
    "phi": Peer(
        PhiAttention,
        PhiConfig,
        {"partial_rotary_factor": 0.5},
        {"bias": True, "rotary_fraction": 0.5},
        rotated=4,
        renamed={"dense": "o_proj"},
    ),
    "deepseek-v2": Peer(
        DeepseekV2Attention, DeepseekV2Config, {**LATENT, "q_lora_rank": None}, LATENT, rotated=4, mla=True
    ),
    "deepseek-v3": Peer(
        DeepseekV3Attention,
        DeepseekV3Config,
        {**LATENT, "q_lora_rank": 10, "attention_bias": True},
        {**LATENT, "q_lora_rank": 10, "bias": True},
        rotated=4,
        mla=True,
    ),
    "kimi": Peer(
        KimiLinearAttention,
        KimiLinearConfig,
        {**LATENT, "q_lora_rank": None},
        {**LATENT, "rotary": False},
        rotated=0,
        mla=True,
    ),
}


def sizes(config: type, **more: Any) -> Any:
    """A small config of theirs, for attention as its equations have it."""
    made = config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=more.pop("kv_heads"), num_hidden_layers=1, **more
    )
    made._attn_implementation = "eager"
    return made


def pair(peer: Peer, dtype: torch.dtype) -> tuple[torch.nn.Module, Layer]:
    """Their layer and ours, with the same random weights."""
    torch.manual_seed(0)
    widths = {} if peer.mla or peer.config is PhiConfig else {"head_dim": 8}
    kv_heads = 4 if peer.mla else 2
    theirs = peer.layer(sizes(peer.config, kv_heads=kv_heads, **widths, **peer.theirs), 0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    theirs = theirs.to(dtype)
    if peer.mla:
        ours: Layer = mla.build(LatentAttentionConfig(heads=4, **peer.ours), BuildContext(dim=32))
    else:
        ours = attention.build(AttentionConfig(heads=4, kv_heads=2, **peer.ours), BuildContext(dim=32))
    weights = {}
    for name, weight in theirs.state_dict().items():
        for old, new in peer.renamed.items():
            name = name.replace(old, new)
        weights[name] = weight + 1 if peer.plus_one and "norm" in name else weight
    ours = ours.to(dtype)
    ours.load_state_dict(weights)
    return theirs, ours


def expected(peer: Peer, layer: torch.nn.Module, x: Tensor) -> Tensor:
    """What their layer computes, given a rotation table and a mask."""
    steps = torch.arange(x.shape[1])
    sees = steps <= steps[:, None]
    if peer.window:
        sees = sees & (steps > steps[:, None] - peer.window)
    arguments: dict[str, Any] = {
        "attention_mask": torch.zeros(sees.shape, dtype=x.dtype).masked_fill(~sees, -torch.inf)[None, None]
    }
    if peer.rotated:
        half = peer.rotated // 2
        angle = (steps[:, None] / 10000.0 ** (torch.arange(half).double() / half))[None].to(x.dtype)
        if peer.layer is GptOssAttention:
            arguments["position_embeddings"] = angle.cos(), angle.sin()
        elif peer.layer is DeepseekV2Attention:
            arguments["position_embeddings"] = torch.polar(torch.ones_like(angle), angle)
        else:
            table = torch.cat([angle, angle], -1)
            arguments["position_embeddings"] = table.cos(), table.sin()
    with pytest.MonkeyPatch.context() as patch:
        if x.dtype == torch.float64:
            # Its norms and its softmax name the dtype that they compute in.
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(Tensor, "float", Tensor.double)
        found: Tensor = layer(x, **arguments)[0]
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS.keys())
@torch.no_grad()
def test_it_is_the_layer_of_transformers(peer: Peer, dtype: torch.dtype, tolerance: float) -> None:
    theirs, ours = pair(peer, dtype)
    x = torch.randn(2, TOKENS, 32, dtype=dtype)
    wanted = expected(peer, theirs, x)
    assert wanted.abs().mean() > 0.1
    assert difference(ours(x).y, wanted) < tolerance
    for lengths in ([1] * TOKENS, [7, 1, 11]):
        state, pieces = ours.init_state(2), []
        for piece in x.split(lengths, 1):
            out = ours(piece, state=state)
            state, pieces = out.state, [*pieces, out.y]
        assert difference(torch.cat(pieces, 1), wanted) < tolerance
