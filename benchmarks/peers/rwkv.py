"""RWKV-4, one block's time and channel mixing, beside that of transformers, and with the same weights.

Theirs walks over the tokens one by one on a CPU, and writes each result into one tensor, which autograd copies.
RWKV-5 to RWKV-7 stand alone: no library that is installed runs a whole batch of them on a CPU.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from peers import Case, layer

NAMES = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}


def cases(dim: int, length: int) -> list[Case]:
    return [rwkv4(dim), *(block(version, dim) for version in (5, 6, 7))]


def block(version: int, dim: int) -> Case:
    """A version's two layers, one after the other, without norms and residuals."""
    both = nn.ModuleList(
        [layer(f"rwkv{version}", dim), layer(f"rwkv{version}-channel", dim, kind="feed_forward")]
    )  # fmt: skip
    with torch.no_grad():
        for p in both.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)  # some start as zeros, whose products would be unlike others
    time, channel = both

    def ours(x: Tensor) -> Tensor:
        y: Tensor = channel(time(x).y).y
        return y

    return Case(f"rwkv{version} with its channel mixing", ours, both)


def rwkv4(dim: int) -> Case:
    ours, peers = block(4, dim), {}
    with contextlib.suppress(ImportError):
        from transformers import RwkvConfig
        from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward, RwkvSelfAttention

        config = RwkvConfig(hidden_size=dim, num_hidden_layers=2)
        theirs = nn.ModuleList([RwkvSelfAttention(config), RwkvFeedForward(config)])
        theirs.load_state_dict(
            {
                ".".join(NAMES.get(part, part) for part in name.split(".")): p
                for name, p in ours.modules.state_dict().items()
            }
        )
        time, channel = theirs

        def run(x: Tensor) -> Tensor:
            y: Tensor = channel(time(x)[0])[0]
            return y

        peers["transformers"] = run
    return Case(ours.name, ours.ours, ours.modules, peers)
