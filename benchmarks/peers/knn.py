"""Attention with a memory of keys and values, beside memorizing-transformers-pytorch: segments of 128 tokens, of which
each attends to itself and to the 32 nearest keys of those before it.

The peer searches in a graph (faiss) whose default it is to keep 16 keys in view, fewer than it asks for, so its numbers
are not ours. It needs faiss-cpu (or faiss-gpu) and einops-exts, which it does not ask for.
"""

from __future__ import annotations

import contextlib
import tempfile

import torch
from torch import Tensor

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.resolve import resolve
from altx.state import State
from peers import Case

SEGMENT = 128


def cases(dim: int, length: int) -> list[Case]:
    attention = {"name": "attention", "heads": dim // 64, "kv_heads": 1, "rotary": False, "qk_norm": "head"}
    parts = {"mixer": attention, "memory": {"name": "knn", "segment": SEGMENT}, "attach": "kv"}
    blueprint = resolve(validate(ModelConfig, {"dim": dim, "blocks": [{"sublayers": [parts]}]}), registry.default())
    layer, peers = build_branch(blueprint.blocks[0][0], BuildContext(dim=dim)), {}

    def ours(x: Tensor) -> Tensor:
        fresh = layer.init_state(len(x), dtype=x.dtype)
        memory, ys = fresh.children["memory"], []
        for piece in x.split(SEGMENT, 1):
            out = layer(piece, state=State(children={**fresh.children, "memory": memory}))
            memory = out.state.children["memory"]
            ys.append(out.y)
        return torch.cat(ys, 1)

    with contextlib.suppress(ImportError):
        from memorizing_transformers_pytorch import KNNAttention, KNNMemory

        theirs = KNNAttention(dim=dim, heads=dim // 64, dim_head=64, num_retrieved_memories=32)
        mixer = layer.mixer
        theirs.load_state_dict(
            {
                "to_q.weight": mixer.q_proj.weight,
                "to_kv.weight": torch.cat([mixer.k_proj.weight, mixer.v_proj.weight]),
                "to_out.weight": mixer.o_proj.weight,
                "scale": theirs.scale.detach(),
            }
        )

        def peer(x: Tensor) -> Tensor:
            with tempfile.TemporaryDirectory() as folder:
                memory = KNNMemory(64, x.shape[1], len(x), f"{folder}/memmap", multiprocessing=False)
                return torch.cat([theirs(piece, knn_memory=memory)[0] for piece in x.split(SEGMENT, 1)], 1)

        peers["memorizing-transformers-pytorch"] = peer
    return [Case("knn", ours, layer, peers, exact=False)]
