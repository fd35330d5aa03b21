"""Target choice: each target uses the tokens of a row that score highest for it."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import FRESH
from altx.router import Route, Router, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import ExpertChoiceConfig, expert_choice_capabilities
from altx_moe.gate import Gate, loads, mean, metrics, routable


class ExpertChoice(Router):
    """Expert choice (Zhou et al. 2022, arXiv:2202.09368, equation 2), row by row.

    Rows do not compete with each other, and a row's capacity follows its real tokens, so neither the rest of
    the batch nor padding changes a route.

    Args:
        config: the capacity.
        dim: model width D.
        n: number of targets.
    """

    def __init__(self, config: ExpertChoiceConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = expert_choice_capabilities(config)
        self.gate = Gate(dim, n)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        batch, length, n = *x.shape[:2], targets.n
        probs = torch.softmax(self.gate(x, targets, ctx), -1)
        real, valid = routable(x, targets, ctx)
        ranked = probs.detach().masked_fill(~valid[..., None], -1).transpose(1, 2)
        chosen = ranked.topk(self.config.capacity(length, n), -1).indices  # (B, n, C)
        ranks = torch.arange(chosen.shape[-1], device=x.device).expand_as(chosen)
        used = ranks < self._capacities(valid, n)[:, None, None]
        if targets.alive is not None:
            used = used & targets.alive[:, None]
        target = torch.where(used, torch.arange(n, device=x.device)[:, None], -1)
        rows = torch.arange(batch, device=x.device)[:, None, None] * length
        token = (rows + chosen).flatten()
        weight = torch.where(used, probs.transpose(1, 2).gather(-1, chosen), 0)
        per_token = torch.zeros(batch * length, device=x.device).index_add(0, token, used.flatten().float())
        return Route(
            n,
            token,
            target.flatten(),
            weight.flatten(),
            metrics=metrics(loads(target.flatten(), n), mean(probs, valid), per_token.reshape(batch, length), real),
        )

    def _capacities(self, valid: Tensor, n: int) -> Tensor:
        """(B,) tokens that each target uses of each row: `config.capacity` of the row's real tokens."""
        tokens = valid.sum(1)
        return torch.minimum(tokens, torch.ceil(self.config.capacity_factor * tokens.double() / n).long())


def build(config: ExpertChoiceConfig, ctx: BuildContext) -> Router:
    return ExpertChoice(config, ctx.dim, ctx.num_targets)
