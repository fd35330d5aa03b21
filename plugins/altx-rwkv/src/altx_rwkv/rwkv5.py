"""RWKV-5: heads with a matrix each, whose rows decay at constant rates (Peng et al. 2024, "Eagle and Finch",
arXiv:2404.05892).

B rows, T tokens, D model width, H heads of K = D / H channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import State
from altx_rwkv.config import RWKV5Config
from altx_rwkv.initial import Depth, bonus, channels, decay_speed, depth, orthogonal, per_channel
from altx_rwkv.matrix_state import MatrixState, read_before
from altx_rwkv.pointwise import times
from altx_rwkv.recurrent import shifted


class RWKV5(MatrixState):
    """The time mixing of Eagle, section 4.1.

        r, k, v, g = W (m x_t + (1 - m) x_{t-1}), each with its own W and m,    w = exp(-exp(time_decay))
        S_t = diag(w) S_{t-1} + k_t v_t^T,    o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
        y_t = W_o (norm(o_t) * silu(g_t)), the norm over each head

    Parameters have the names and shapes of the authors' code, so their checkpoints fit.

    Args:
        dim, heads, norm_eps, place: as in `MatrixState`.
    """

    def __init__(self, dim: int, *, heads: int, norm_eps: float, place: Depth) -> None:
        super().__init__(dim, heads=heads, norm_eps=norm_eps, place=place)
        self.time_decay = nn.Parameter(decay_speed(dim, -6, 5, 0.7 + 1.3 * place.rising).reshape(heads, -1))
        self.time_faaaa = nn.Parameter(bonus(dim, place).reshape(heads, -1))
        shared, half = channels(dim) ** place.falling, channels(dim) ** (0.5 * place.falling)
        self.time_mix_k = per_channel(shared)
        self.time_mix_v = per_channel(shared + 0.3 * place.rising)
        self.time_mix_r = per_channel(half)
        self.time_mix_g = per_channel(half)
        self.gate = nn.Linear(dim, dim, bias=False)
        orthogonal(self.gate.weight, 0.1)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        groups = super().param_groups()
        groups["time_decay"]["lr_scale"] = 2.0
        return groups

    def mix(
        self, batch: RealFirst, shared: Mapping[str, Tensor], state: State | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        mix = 1 - torch.cat([self.time_mix_r, self.time_mix_k, self.time_mix_v, self.time_mix_g])[:, 0]
        xr, xk, xv, xg = shifted(batch, mix, state)
        r, k, v = self.split(self.receptance(xr)), self.split(self.key(xk)), self.split(self.value(xv))
        gate = F.silu(self.gate(xg))
        wide = torch.promote_types(self.time_decay.dtype, torch.float32)
        g = -torch.exp(self.time_decay.to(wide)).expand_as(k)
        y, kv = read_before(r, k, v, g, self.time_faaaa, batch, state)
        return self.output(times(self.norm(y), gate)), {"kv": kv}, {}


def build(config: RWKV5Config, ctx: BuildContext) -> RWKV5:
    return RWKV5(ctx.dim, heads=config.heads(ctx.dim), norm_eps=config.norm_eps, place=depth(ctx))
