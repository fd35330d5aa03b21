"""Targets by the token's number: hash layers."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import FRESH
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import HashConfig, hash_capabilities
from altx_moe.gate import routable, token_choice


class Hash(Router):
    """Random hash (Roller et al. 2021, Hash Layers for Large Sparse Models, arXiv:2106.04426, section 3.2).

    No table: a token uses the k targets for which a hash of both numbers is largest (rendezvous hashing), so a dead
    target's tokens spread over the others, and no other token moves.

    Args:
        config: k and seed.
        n: number of targets.
    """

    def __init__(self, config: HashConfig, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = hash_capabilities(config)
        self.n = n

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        n, k = targets.n, self.config.k
        present, valid = routable(x, targets, ctx)
        ids = torch.where(present, ctx.shared["token_ids"], 0)
        score = mixed(mixed(ids[..., None] + self.config.seed * 0x1000003) ^ torch.arange(1, n + 1, device=x.device))
        if targets.alive is not None:
            score = score.masked_fill(~targets.alive, -1)
        picked = score.topk(k, -1)
        target = torch.where(valid[..., None] & (picked.values >= 0), picked.indices, -1)
        weight = (target >= 0).to(torch.promote_types(x.dtype, torch.float32)) / k
        probs = torch.full((n,), 1 / n, device=x.device)
        return token_choice(target, weight, n, probs, present)


def mixed(x: Tensor) -> Tensor:
    """A hash of int64, at least 0: the finaliser of SplitMix64 (Steele et al. 2014), shifts with sign."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31)) & 0x7FFFFFFFFFFFFFFF


def build(config: HashConfig, ctx: BuildContext) -> Router:
    return Hash(config, ctx.num_targets)
