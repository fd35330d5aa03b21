"""RWKV-6: heads with a matrix each, whose rows decay as the token says (Peng et al. 2024, "Eagle and Finch",
arXiv:2404.05892).

B rows, T tokens, D model width, H heads of K = D / H channels, M rank of the token shifts, R rank of the decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import State
from altx_rwkv.config import RWKV6Config
from altx_rwkv.initial import Depth, bonus, channels, decay_speed, depth, orthogonal, per_channel
from altx_rwkv.matrix_state import MatrixState, read_before
from altx_rwkv.pointwise import affine, blend, times
from altx_rwkv.recurrent import token_before


class RWKV6(MatrixState):
    """The time mixing of Finch, section 4.2.

        d = x_{t-1} - x_t,    x_z = x_t + d (m_z + tanh((x_t + d m_x) A_z) B_z) for z of w, k, v, r, g
        r, k, v, g = W_z x_z,    w_t = exp(-exp(time_decay + tanh(x_w A) B))
        S_t = diag(w_t) S_{t-1} + k_t v_t^T,    o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
        y_t = W_o (norm(o_t) * silu(g_t)), the norm over each head

    Parameters have the names and shapes of the authors' code, so their checkpoints fit.

    Args:
        dim, heads, norm_eps, place: as in `MatrixState`.
        mix_rank: M.
        decay_rank: R.
    """

    def __init__(self, dim: int, *, heads: int, norm_eps: float, place: Depth, mix_rank: int, decay_rank: int) -> None:
        super().__init__(dim, heads=heads, norm_eps=norm_eps, place=place)
        shared, half = channels(dim) ** place.falling, channels(dim) ** (0.5 * place.falling)
        self.time_maa_x = per_channel(1 - shared)
        self.time_maa_w = per_channel(1 - shared)
        self.time_maa_k = per_channel(1 - shared)
        self.time_maa_v = per_channel(1 - (shared + 0.3 * place.rising))
        self.time_maa_r = per_channel(1 - half)
        self.time_maa_g = per_channel(1 - half)
        self.time_maa_w1 = nn.Parameter(torch.zeros(dim, 5 * mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, mix_rank, dim).uniform_(-0.01, 0.01))
        self.time_decay = per_channel(decay_speed(dim, -6, 5, 0.7 + 1.3 * place.rising))
        self.time_decay_w1 = nn.Parameter(torch.zeros(dim, decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-0.01, 0.01))
        self.time_faaaa = nn.Parameter(bonus(dim, place).reshape(heads, -1))
        self.gate = nn.Linear(dim, dim, bias=False)
        orthogonal(self.gate.weight, 0.1)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        groups = super().param_groups()
        groups["time_decay"]["lr_scale"] = 2.0
        return groups

    def mix(
        self, batch: RealFirst, shared: Mapping[str, Tensor], state: State | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        x, before = batch.x, token_before(batch, state)
        change = before - x
        xw, xk, xv, xr, xg = (blend(x, change, m) for m in self._shifts(x, before))
        r, k, v = (
            self.split(project(part)) for project, part in ((self.receptance, xr), (self.key, xk), (self.value, xv))
        )
        gate = F.silu(self.gate(xg))
        w = affine(xw, self.time_decay_w1, self.time_decay_w2, self.time_decay, squash=True)
        g = -torch.exp(self.split(w).to(torch.promote_types(w.dtype, torch.float32)))
        y, kv = read_before(r, k, v, g, self.time_faaaa, batch, state)
        return self.output(times(self.norm(y), gate)), {"kv": kv}, {}

    def _shifts(self, x: Tensor, before: Tensor) -> Iterable[Tensor]:
        """How much of the token before goes into what w, k, v, r and g see: (B, T, D) each."""
        base = torch.cat([self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g])
        inner = torch.tanh(torch.lerp(x, before, self.time_maa_x) @ self.time_maa_w1)
        inner = inner.flatten(0, 1).unflatten(-1, (5, -1)).transpose(0, 1)
        shifts = torch.baddbmm(base.to(inner.dtype), inner, self.time_maa_w2).to(x.dtype)
        return [shift.reshape(x.shape) for shift in shifts]


def build(config: RWKV6Config, ctx: BuildContext) -> RWKV6:
    return RWKV6(
        ctx.dim,
        heads=config.heads(ctx.dim),
        norm_eps=config.norm_eps,
        place=depth(ctx),
        mix_rank=config.mix_rank,
        decay_rank=config.decay_rank,
    )
