"""altx-moe's layer of 8 SwiGLU experts, top-2, beside transformers' Mixtral block and a loop over its experts, with the
same weights; and top-2 of 4 NTM memories beside the memories with their tokens."""

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
from altx.router import Targets
from peers import Case

EXPERTS, CHOSEN, MEMORIES = 8, 2, 4


def cases(dim: int, length: int) -> list[Case]:
    ours = routed(dim, {"feed_forward": "swiglu", "repeat": EXPERTS})
    tokens = torch.randn(1, length, dim)
    peers = {"loop": Loop(ours), **mixtral(ours, dim)}
    moe = Case("moe", lambda x: ours(x).y, ours, peers, floor=experts_products(ours, tokens))
    memories = routed(dim, {"memory": "ntm", "repeat": MEMORIES})
    return [moe, Case("memories", lambda x: memories(x).y, memories, floor=work_alone(memories, tokens))]


def routed(dim: int, target: dict[str, Any]) -> Any:
    """A layer of top-2 among equal targets."""
    sublayer = {"router": {"name": "topk", "k": CHOSEN}, "targets": [target]}
    blueprint = resolve(validate(ModelConfig, {"dim": dim, "blocks": [{"sublayers": [sublayer]}]}), registry.default())
    return build_branch(blueprint.blocks[0][0], BuildContext(dim=dim))


def loads(ours: Any, tokens: Tensor) -> list[int]:
    """How many of the tokens each target gets."""
    with torch.no_grad():
        return ours.router.route(tokens, Targets(ours.n, ours.kind)).metrics["load"].int().tolist()


def experts_products(ours: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """The products of every expert with as many tokens as it gets."""
    stacked = [ours.targets.gate, ours.targets.up, ours.targets.down]
    weights = [nn.Parameter(each[i].detach().clone()) for each in stacked for i in range(EXPERTS)]
    rows = loads(ours, tokens) * len(stacked)
    inputs = [torch.randn(n, w.shape[0], requires_grad=True) for n, w in zip(rows, weights, strict=True)]
    return lambda: torch.stack([(x @ w).sum() for x, w in zip(inputs, weights, strict=True)]).sum()


def work_alone(ours: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """Every target with as many tokens as it gets."""
    inputs = [torch.randn(1, n, tokens.shape[-1], requires_grad=True) for n in loads(ours, tokens)]
    return lambda: torch.stack([layer(x).y.sum() for layer, x in zip(ours.layers, inputs, strict=True)]).sum()


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
