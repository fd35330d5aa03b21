"""With the same weights, it is memorizing-transformers-pytorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from altx import BuildContext, registry
from altx.attach import KVAttach
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.resolve import resolve
from altx.state import State
from altx.testing.case import difference

THEIRS = load_file(Path(__file__).with_name("knn_upstream_values.safetensors"))
"""KNNAttention of memorizing-transformers-pytorch 0.4.1 (16 wide, 4 heads of 8, 5 retrieved, no XL memory) in float64,
over 40 tokens in calls of 8, with a KNNMemory of 64 whose memmap is made of float64 and whose faiss index searches with
efSearch 4096, which sees every key. Drawn with seed 0. The gradients are those of the sum of y times "weight"."""


def ours(**settings: Any) -> KVAttach:
    attention = {
        "name": "attention",
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 8,
        "rotary": False,
        # Their keys and queries have norm 1, where an RMS norm's has sqrt(8).
        "qk_norm": "head",
        "norm_eps": 1e-30,
        "scale": float(THEIRS["scale"][0].exp()) / 8,
    }
    parts = {"mixer": attention, "memory": {"name": "knn", "k": 5, "segment": 8, **settings}, "attach": "kv"}
    blueprint = resolve(validate(ModelConfig, {"dim": 16, "blocks": [{"sublayers": [parts]}]}), registry.default())
    layer = build_branch(blueprint.blocks[0][0], BuildContext(dim=16)).double()
    assert isinstance(layer, KVAttach)
    k, v = THEIRS["to_kv.weight"].chunk(2)
    weights = {"q_proj": THEIRS["to_q.weight"], "k_proj": k, "v_proj": v, "o_proj": THEIRS["to_out.weight"]}
    norms = {f"{name}.weight": torch.ones(8) for name in ("q_norm", "k_norm")}
    layer.mixer.load_state_dict({**{f"{name}.weight": weight for name, weight in weights.items()}, **norms})
    return layer


def in_calls(layer: KVAttach, x: Tensor) -> Tensor:
    """Calls of 8 tokens, of which only the memory goes on to the next."""
    state, ys = layer.init_state(2), []
    for piece in x.split(8, 1):
        out = layer(piece, state=state)
        assert out.state
        ys.append(out.y)
        state = State(children={**layer.init_state(2).children, "memory": out.state.children["memory"]})
    return torch.cat(ys, 1)


@pytest.mark.parametrize("settings", [{}, {"search": "hnsw", "block": 8}, {"block": 16, "path": "store"}], ids=str)
def test_outputs_and_gradients_are_theirs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layer, x = ours(**settings), THEIRS["x"].clone().requires_grad_()
    y = in_calls(layer, x)
    assert difference(y, THEIRS["y"]) < 1e-12
    assert difference(y, layer.mixer(x).y) > 1e-3
    (y * THEIRS["weight"]).sum().backward()
    mixer: Any = layer.mixer
    assert difference(x.grad, THEIRS["x_grad"]) < 1e-12
    assert difference(mixer.q_proj.weight.grad, THEIRS["to_q_grad"]) < 1e-12
    both = torch.cat([mixer.k_proj.weight.grad, mixer.v_proj.weight.grad])
    assert difference(both, THEIRS["to_kv_grad"]) < 1e-12
