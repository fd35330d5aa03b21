"""altx-moe's layer of 8 SwiGLU experts, top-2, beside transformers' Mixtral block and a loop over its experts, with the
same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.resolve import resolve
from peers import Case

EXPERTS, CHOSEN = 8, 2


def cases(dim: int, length: int) -> list[Case]:
    targets = [{"feed_forward": "swiglu", "repeat": EXPERTS}]
    sublayer = {"router": {"name": "topk", "k": CHOSEN}, "targets": targets}
    blueprint = resolve(validate(ModelConfig, {"dim": dim, "blocks": [{"sublayers": [sublayer]}]}), registry.default())
    ours: Any = build_branch(blueprint.blocks[0][0], BuildContext(dim=dim))
    return [Case("moe", lambda x: ours(x).y, used(ours), {"loop": Loop(ours), **mixtral(ours, dim)})]


class Loop(nn.Module):
    """The same layer as a loop over experts, as one writes it first."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.router, self.bank = ours.router, ours.targets

    def forward(self, x: Tensor) -> Tensor:
        rows, bank = x.flatten(0, 1), self.bank
        scores, index = torch.softmax(F.linear(rows, self.router.gate.weight), -1).topk(CHOSEN, -1)
        scores = scores / scores.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for i in range(EXPERTS):
            token, place = torch.where(index == i)
            hidden = F.silu(rows[token] @ bank.gate[i]) * (rows[token] @ bank.up[i])
            y = y.index_add(0, token, (hidden @ bank.down[i]) * scores[token, place, None])
        return y.view_as(x)


def used(ours: Any) -> nn.ModuleList:
    """The matrices that a token meets, for the floor: as many products as there are, gradients of fewer weights."""
    bank = ours.targets
    shapes = [w.shape[1:] for w in (bank.gate, bank.up, bank.down)] * CHOSEN
    return nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in shapes)


def mixtral(ours: Any, dim: int) -> dict[str, Callable[[Tensor], Tensor]]:
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return {}
    bank, found = ours.targets, {}
    for implementation in ("eager", "grouped_mm"):
        config = MixtralConfig(
            hidden_size=dim, intermediate_size=bank.gate.shape[2], num_local_experts=EXPERTS,
            num_experts_per_tok=CHOSEN, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        )  # fmt: skip
        config._experts_implementation = implementation
        theirs = MixtralSparseMoeBlock(config)
        with torch.no_grad():
            theirs.gate.weight.copy_(ours.router.gate.weight)
            theirs.experts.gate_up_proj.copy_(torch.cat([bank.gate, bank.up], 2).transpose(1, 2))
            theirs.experts.down_proj.copy_(bank.down.transpose(1, 2))
        found[f"transformers, {implementation}"] = theirs
    return found
