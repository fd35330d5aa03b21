"""No choice at all: every slot of a target gets a mixture of a row's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH
from altx.router import Route, Router, Slots, Targets
from altx.spec import BuildContext
from altx.state import State
from altx_moe.config import SoftConfig, soft_capabilities
from altx_moe.gate import mean, precise_linear, real, routable


class Soft(Router):
    """Soft mixture of experts (Puigcerver et al. 2023, arXiv:2308.00951, equations 1 to 3 and algorithm 2).

    Args:
        config: slots.
        dim: model width D.
        n: number of targets.
    """

    def __init__(self, config: SoftConfig, dim: int, n: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = soft_capabilities(config)
        self.phi = nn.Parameter(torch.empty(n * config.slots, dim))
        # LeCun's, as in the authors' code: logits of about 1.
        nn.init.normal_(self.phi, std=dim**-0.5)
        self.scale = nn.Parameter(torch.ones(())) if config.normalise else None

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        present, valid = routable(x, targets, ctx)
        tokens: Tensor = real(x, ctx)
        phi: Tensor = self.phi
        if self.scale is not None:
            # In at least float32, as the logits: a length is a sum of squares.
            precise = torch.promote_types(x.dtype, torch.float32)
            tokens, phi = F.normalize(tokens.to(precise), dim=-1), F.normalize(phi.to(precise), dim=-1) * self.scale
        logits = precise_linear(tokens, phi).unflatten(-1, (targets.n, self.config.slots))  # (B, T, n, S)
        if targets.alive is not None:
            logits = logits.masked_fill(~targets.alive[:, None], torch.finfo(logits.dtype).min)
        here = valid[..., None, None]
        # A row without a token has no mixture: 0.
        share = torch.softmax(logits.masked_fill(~here, torch.finfo(logits.dtype).min), 1)
        dispatch = torch.where(here, share, 0).permute(0, 2, 3, 1)
        mix = torch.softmax(logits.flatten(2), -1).unflatten(-1, logits.shape[2:])
        combine = torch.where(here, mix, 0).permute(0, 2, 3, 1)
        if targets.alive is not None:
            dispatch = torch.where(targets.alive[:, None, None], dispatch, 0)
        probs = mean(mix.sum(-1), valid).detach()
        used = (dispatch.detach() > 0).any(-1)  # (B, n, S)
        load = used.sum((0, 2)).to(probs.dtype)
        none = torch.zeros(0, dtype=torch.int64, device=x.device)
        measured = {
            "load": load,
            "max_load": load.max() / load.mean().clamp(min=1 / targets.n),
            "entropy": -torch.xlogy(probs, probs).sum(),
            "drop_rate": torch.zeros_like(load[0]),
            "no_target": (present & ~valid).sum(),
        }
        return Route(targets.n, none, none, logits.new_zeros(0), metrics=measured, slots=Slots(dispatch, combine))


def build(config: SoftConfig, ctx: BuildContext) -> Router:
    return Soft(config, ctx.dim, ctx.num_targets)
