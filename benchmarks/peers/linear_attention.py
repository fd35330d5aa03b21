"""The linear recurrences of altx-linear-attention beside linear-attention-transformer and transformers, weights alike.

`linear-attention[exp]` has the feature map of its peer: exp of the keys, softmax of the queries. The layers of fla, the
other home of `gla`, `hgrn2` and `retnet`, do not run on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor, nn

from peers import Case, layer

Peers = dict[str, Callable[[Tensor], Tensor]]
HEADS = 8


def cases(dim: int, length: int) -> list[Case]:
    exp = layer("linear-attention", dim, heads=HEADS, feature_map="exp", bias=False)
    plain = [case(name, layer(name, dim)) for name in ("linear-attention", "gla", "hgrn2", "retnet")]
    compared = [("linear-attention[exp]", exp, linear_attention), ("lightning", layer("lightning", dim), minimax)]
    compared.append(("mlstm", layer("mlstm", dim), xlstm))
    return plain + [case(name, ours, peers(ours, dim)) for name, ours, peers in compared]


def case(name: str, ours: nn.Module, peers: Peers | None = None) -> Case:
    return Case(name, lambda x: ours(x).y, ours, peers or {})


def linear_attention(ours: nn.Module, dim: int) -> Peers:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from linear_attention_transformer.linear_attention_transformer import SelfAttention
    except ImportError:
        return {}
    theirs = SelfAttention(dim, HEADS, causal=True)
    names = {
        "to_q": "query_projection",
        "to_k": "key_projection",
        "to_v": "value_projection",
        "to_out": "out_projection",
    }
    for new, old in names.items():
        getattr(theirs, new).load_state_dict(getattr(ours, old).state_dict())
    return {"linear-attention-transformer": theirs}


def minimax(ours: nn.Module, dim: int) -> Peers:
    try:
        from transformers import MiniMaxConfig
        from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
    except ImportError:
        return {}
    # The first of so many blocks that its slopes are ours, the first of one.
    config = MiniMaxConfig(hidden_size=dim, num_attention_heads=ours.heads, head_dim=ours.width, num_hidden_layers=2)
    theirs = MiniMaxLightningAttention(config, 0)
    theirs.load_state_dict(ours.state_dict(), strict=False)  # all but its buffers
    return {"transformers": lambda x: theirs(x, None, None)[0]}


def xlstm(ours: nn.Module, dim: int) -> Peers:
    try:
        from transformers import xLSTMConfig
        from transformers.models.xlstm.modeling_xlstm import xLSTMLayer
    except ImportError:
        return {}
    theirs = xLSTMLayer(xLSTMConfig(hidden_size=dim, num_heads=ours.heads, num_hidden_layers=1))
    theirs.load_state_dict(ours.state_dict())
    return {"transformers": lambda x: theirs(x)[0]}
