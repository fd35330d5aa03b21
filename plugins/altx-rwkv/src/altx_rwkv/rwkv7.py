"""RWKV-7: heads with a matrix each, which learns in context by a delta rule (Peng et al. 2025, "Goose",
arXiv:2503.14456).

B rows, T tokens, D model width, H heads of K = D / H channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import State
from altx_kernels.delta_rule import delta_rule
from altx_rwkv.config import RWKV7Config
from altx_rwkv.initial import Depth, channels, decay_speed, depth, orthogonal, per_channel, ramp
from altx_rwkv.matrix_state import MatrixState
from altx_rwkv.pointwise import affine, blend, times
from altx_rwkv.recurrent import real, shifted

DECAY = exp(-0.5)
"""No log decay is below -DECAY."""


class RWKV7(MatrixState):
    """The time mixing of section 4.1.

        x_z = x_t + m_z (x_{t-1} - x_t) for z of r, w, k, v, a, g,    r, k, v = W_z x_z
        w = exp(-e^{-1/2} sigmoid(w_0 + tanh(x_w w_1) w_2))
        a = sigmoid(a_0 + x_a a_1 a_2),    g = sigmoid(x_g g_1) g_2
        v <- v + (v_first - v) sigmoid(v_0 + x_v v_1 v_2), v_first being the v of the first such layer of the model
        kappa = k k_k / |k k_k| in each head,    k <- k (1 + (a - 1) k_a)
        S_t = (diag(w) - (a kappa) kappa^T) S_{t-1} + k v^T,    o_t = r^T S_t
        y_t = W_o ((norm(o_t) + (r k r_k).sum() v) g), norm and sum over each head

    Parameters have the names and shapes of the authors' code, so their checkpoints fit. The first such layer has no
    v_0, v_1 and v_2, which the authors' files may hold unused.

    Args:
        dim, heads, norm_eps, place: as in `MatrixState`.
        first: whether no earlier layer exports v_first.
        decay_rank, iclr_rank, value_rank, gate_rank: widths of w_1, a_1, v_1 and g_1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        norm_eps: float,
        place: Depth,
        first: bool,
        decay_rank: int,
        iclr_rank: int,
        value_rank: int,
        gate_rank: int,
    ) -> None:
        super().__init__(dim, heads=heads, norm_eps=norm_eps, place=place)
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (
            per_channel(1 - channels(dim) ** (power * place.falling)) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
        )
        curve, line = _curve(dim, dim // heads), ramp(dim) - 0.5
        self.w0 = per_channel(decay_speed(dim, -6, 6, 1 + place.rising**0.3) + 0.5 + 2.5 * curve)
        self.w1, self.w2 = _low_rank(dim, decay_rank)
        self.a0 = per_channel(-0.19 + 0.3 * curve + 0.4 * line)
        self.a1, self.a2 = _low_rank(dim, iclr_rank)
        if not first:
            self.v0 = per_channel(0.73 - 0.4 * line)
            self.v1, self.v2 = _low_rank(dim, value_rank)
        self.g1, self.g2 = _low_rank(dim, gate_rank)
        self.k_k = per_channel(0.71 - 0.1 * line)
        self.k_a = per_channel(torch.full((dim,), 1.02))
        self.r_k = nn.Parameter(torch.full((heads, dim // heads), -0.04))
        self.exported, self.read = (("v_first",), ()) if first else ((), ("v_first",))

    def param_groups(self) -> dict[str, dict[str, Any]]:
        groups = super().param_groups()
        groups["w0"]["lr_scale"] = 2.0
        return groups

    def mix(
        self, batch: RealFirst, shared: Mapping[str, Tensor], state: State | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        mix = torch.cat([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g])[:, 0]
        xr, xw, xk, xv, xa, xg = shifted(batch, mix, state)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = affine(xw, self.w1, self.w2, self.w0, squash=True)
        g = times(torch.sigmoid(w.to(torch.promote_types(w.dtype, torch.float32))), -DECAY)
        exports = {name: v for name in self.exported}
        if self.read:
            change = shared["v_first"].to(v.dtype) - v
            v = blend(v, change, torch.sigmoid(affine(xv, self.v1, self.v2, self.v0)).to(v.dtype))
        a = torch.sigmoid(affine(xa, self.a1, self.a2, self.a0)).to(k.dtype)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        kappa = F.normalize(self.split(k * self.k_k), dim=-1)
        k = torch.lerp(k, k * a, self.k_a.to(k.dtype))
        r, k, v, a, g = (self.split(part) for part in (r, k, v, a, g))
        y, kv = delta_rule(
            r, real(k, batch), v, real((a * kappa).neg_(), batch), kappa, real(g, batch),
            initial_state=state["kv"] if state else None, reset=batch.reset,
        )  # fmt: skip
        own = torch.einsum("bthk,hk->bth", r * k, self.r_k.to(r.dtype))[..., None]
        y = torch.addcmul(self.split(self.norm(y)), own, v).flatten(2)
        return self.output(times(y, gate)), {"kv": kv}, exports


def _curve(dim: int, width: int) -> Tensor:
    """From -1 to 1 in every head, flat in the middle: (dim,)."""
    line = 2 * ramp(width) - 1 if width > 1 else torch.zeros(1)
    return (line * line.abs()).repeat(dim // width)


def _low_rank(dim: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Two factors of a matrix (dim, dim), which starts as zeros."""
    up = torch.empty(rank, dim)
    orthogonal(up, 0.1)
    return nn.Parameter(torch.zeros(dim, rank)), nn.Parameter(up)


def build(config: RWKV7Config, ctx: BuildContext) -> RWKV7:
    return RWKV7(
        ctx.dim,
        heads=config.heads(ctx.dim),
        norm_eps=config.norm_eps,
        place=depth(ctx),
        first="v_first" not in ctx.exported,
        **config.ranks(ctx.dim),
    )
