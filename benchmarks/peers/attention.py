"""altx-attention beside a layer of four linear maps and torch's fused attention, and the layers of transformers.

The layer of torch has no positions: where ours rotates, it does less. Those of transformers are given their rotation
table and their mask, made once; a model makes them once for all its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers import Case, layer

Peers = dict[str, Callable[[Tensor], Tensor]]
HEADS = 12


class Plain(nn.Module):
    """Four linear maps and `scaled_dot_product_attention`, with the weights of ours."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.head_dim = ours.head_dim
        self.maps = nn.ModuleList(
            nn.Linear(m.in_features, m.out_features, bias=False)
            for m in (ours.q_proj, ours.k_proj, ours.v_proj, ours.o_proj)
        )
        for mine, its in zip(self.maps, (ours.q_proj, ours.k_proj, ours.v_proj, ours.o_proj), strict=True):
            mine.load_state_dict(its.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for m in self.maps[:3])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.maps[3](y.transpose(1, 2).flatten(2))


def cases(dim: int, length: int) -> list[Case]:
    heads = HEADS if dim % HEADS == 0 else 4
    bare = layer("attention", dim, heads=heads, rotary=False)
    whole, wide = layer("attention", dim, heads=heads), layer("attention", dim)
    capped = layer("attention", dim, heads=heads, softcap=50.0, head_dim=dim // heads)
    sinks = layer("attention", dim, heads=heads, sinks=True, bias=True)
    window = layer("attention", dim, heads=heads, window=256)
    mla = layer("mla", dim, heads=heads)
    return [
        case("attention[no positions]", bare, {"torch": Plain(bare)}),
        case("attention", whole, llama(whole, dim, length, heads)),
        case("attention, torch without positions", whole, {"torch": Plain(whole)}, exact=False),
        case("attention[4 heads], torch without positions", wide, {"torch": Plain(wide)}, exact=False),
        case("attention[softcap]", capped, gemma2(capped, dim, length, heads)),
        case("attention[sinks]", sinks, gpt_oss(sinks, dim, length, heads)),
        case("attention[window 256]", window, {"torch, all before": Plain(window)}, exact=False),
        case("mla", mla, deepseek(mla, dim, length, heads)),
    ]


def case(name: str, ours: nn.Module, peers: Peers, exact: bool = True) -> Case:
    return Case(name, lambda x: ours(x).y, ours, peers, exact)


def theirs(
    ours: nn.Module, peer: nn.Module, length: int, width: int, *, halved: bool = False, mask: bool = False
) -> Any:
    """A layer of transformers with our weights, as a function of x.

    Args:
        width: of what is rotated.
        halved: whether its table holds each angle once.
        mask: whether it needs a mask to be causal.
    """
    peer.load_state_dict(ours.state_dict())
    angle = torch.arange(float(length))[:, None] / 10000.0 ** (torch.arange(0, width, 2) / width)
    table = (angle if halved else torch.cat([angle, angle], -1))[None]
    hidden = torch.full((length, length), -torch.inf).triu(1)[None, None] if mask else None
    return lambda x: peer(x, position_embeddings=(table.cos(), table.sin()), attention_mask=hidden)[0]


def config(cls: Any, dim: int, heads: int, kind: str, **more: Any) -> Any:
    made = cls(hidden_size=dim, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=1, **more)
    made._attn_implementation = kind
    return made


def llama(ours: nn.Module, dim: int, length: int, heads: int) -> Peers:
    try:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaAttention
    except ImportError:
        return {}
    peer = LlamaAttention(config(LlamaConfig, dim, heads, "sdpa"), 0)
    return {"transformers": theirs(ours, peer, length, dim // heads)}


def gemma2(ours: nn.Module, dim: int, length: int, heads: int) -> Peers:
    """Its soft cap is in its plain attention only."""
    try:
        from transformers import Gemma2Config
        from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
    except ImportError:
        return {}
    width = dim // heads
    made = config(
        Gemma2Config, dim, heads, "eager", head_dim=width, query_pre_attn_scalar=width, layer_types=["full_attention"]
    )
    return {"transformers": theirs(ours, Gemma2Attention(made, 0), length, width, mask=True)}


def gpt_oss(ours: nn.Module, dim: int, length: int, heads: int) -> Peers:
    """Its sinks are in its plain attention only."""
    try:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
    except ImportError:
        return {}
    width = dim // heads
    made = config(
        GptOssConfig, dim, heads, "eager", head_dim=width, attention_bias=True, layer_types=["full_attention"]
    )
    return {"transformers": theirs(ours, GptOssAttention(made, 0), length, width, halved=True, mask=True)}


def deepseek(ours: Any, dim: int, length: int, heads: int) -> Peers:
    try:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
    except ImportError:
        return {}
    made = config(
        DeepseekV3Config, dim, heads, "sdpa", q_lora_rank=None, kv_lora_rank=ours.rank, qk_nope_head_dim=ours.nope,
        qk_rope_head_dim=ours.rope, v_head_dim=ours.value,
    )  # fmt: skip
    return {"transformers": theirs(ours, DeepseekV3Attention(made, 0), length, ours.rope)}
