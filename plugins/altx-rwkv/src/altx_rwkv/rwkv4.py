"""RWKV-4: a mean of all values so far for every channel, weighted by keys that decay (Peng et al. 2023,
arXiv:2305.13048).

B rows, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_rwkv.config import RWKV4Config
from altx_rwkv.initial import Depth, channels, decay_speed, depth, orthogonal, per_channel, zigzag
from altx_rwkv.kernels.wkv4 import EMPTY, wkv4
from altx_rwkv.pointwise import times
from altx_rwkv.recurrent import Recurrent, shifted


class RWKV4(Recurrent):
    """The time mixing of section 3.1, with equations 11 to 17.

        k = W_k (m_k x_t + (1 - m_k) x_{t-1}),   v, r alike
        wkv_t = (sum_{i<t} e^{k_i + (t-1-i) w} v_i + e^{k_t + u} v_t) / (the same without v),   w = -exp(time_decay)
        y_t = W_o (sigmoid(r_t) * wkv_t)

    Parameters have the names and shapes of the authors' code, so their checkpoints fit.

    Args:
        dim: D.
        place: where the block stands, which the first weights depend on.
    """

    def __init__(self, dim: int, place: Depth) -> None:
        super().__init__()
        size = dim
        self.time_decay = nn.Parameter(decay_speed(size, -5, 8, 0.7 + 1.3 * place.rising))
        self.time_first = nn.Parameter(log(0.3) + 0.5 * zigzag(size))
        shared = channels(dim) ** place.falling
        self.time_mix_k = per_channel(shared)
        self.time_mix_v = per_channel(shared + 0.3 * place.rising)
        self.time_mix_r = per_channel(channels(dim) ** (0.5 * place.falling))
        self.key = nn.Linear(dim, size, bias=False)
        self.value = nn.Linear(dim, size, bias=False)
        self.receptance = nn.Linear(dim, size, bias=False)
        self.output = nn.Linear(size, dim, bias=False)
        orthogonal(self.value.weight)
        for layer in (self.key, self.receptance, self.output):
            nn.init.zeros_(layer.weight)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        groups = super().param_groups()
        groups["time_decay"]["lr_scale"] = 2.0
        groups["time_first"]["lr_scale"] = 3.0
        return groups

    @property
    def dim(self) -> int:
        return self.key.in_features

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        return {"wkv": ((2, self.key.out_features), Leaf(fp32=True))}

    def fresh(self, zeros: State) -> State:
        zeros["wkv"][:, 1] = EMPTY
        return zeros

    def mix(
        self, batch: RealFirst, shared: Mapping[str, Tensor], state: State | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        mix = 1 - torch.cat([self.time_mix_k, self.time_mix_v, self.time_mix_r])[:, 0]
        xk, xv, xr = shifted(batch, mix, state)
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)
        wide = torch.promote_types(self.time_decay.dtype, torch.float32)
        y, wkv = wkv4(
            -torch.exp(self.time_decay.to(wide)), self.time_first, k, v,
            initial_state=state["wkv"] if state else None, reset=batch.reset, lengths=batch.lengths,
        )  # fmt: skip
        return self.output(times(torch.sigmoid(r), y)), {"wkv": wkv}, {}


def build(config: RWKV4Config, ctx: BuildContext) -> RWKV4:
    return RWKV4(ctx.dim, depth(ctx))
