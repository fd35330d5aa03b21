"""Gated DeltaNet: a delta rule whose state decays as Mamba-2's (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.spec import BuildContext
from altx_linear_attention.delta import UNDECAYED, DeltaMixer, initial_A_log, initial_dt_bias, initialise
from altx_linear_attention.gated_deltanet_config import GatedDeltaNetConfig
from altx_linear_attention.norms import GatedNorm


class GatedDeltaNet(DeltaMixer):
    """Equation 10, in the block of figure 1.

        S_t = alpha_t (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = q_t S_t / sqrt(K)
        q, k = l2norm(silu(conv(W x))),    v = silu(conv(W_v x)),    y = W_o (norm(o) * silu(W_g x))
        beta = sigmoid(W_b x),    alpha = exp(-A softplus(W_a x + dt_bias))

    Parameters have the names and shapes of flash-linear-attention's layer, so its checkpoints fit;
    `altx_linear_attention.convert` renames those of Qwen3-Next.

    Args:
        dim: D.
        output_gate: whether there is a W_g.
        norm_eps: added to the mean square of a head's output.
        sizes: as for `DeltaMixer`.
    """

    def __init__(self, dim: int, *, output_gate: bool, norm_eps: float, **sizes: Any) -> None:
        super().__init__(dim, norm=GatedNorm(sizes["value_dim"], eps=norm_eps), **sizes)
        heads = self.value_heads
        self.a_proj = nn.Linear(dim, heads, bias=False)
        self.A_log = nn.Parameter(initial_A_log(heads, 0))
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.g_proj = nn.Linear(dim, heads * self.value_dim, bias=False) if output_gate else None
        initialise(self)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        return UNDECAYED

    def decay(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return -self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias)

    def gate(self, x: Tensor) -> Tensor | None:
        return None if self.g_proj is None else self.g_proj(x)


def build(config: GatedDeltaNetConfig, ctx: BuildContext) -> GatedDeltaNet:
    heads, head_dim, value_heads, value_dim = config.sizes(ctx.dim)
    return GatedDeltaNet(
        ctx.dim,
        heads=heads,
        head_dim=head_dim,
        value_heads=value_heads,
        value_dim=value_dim,
        conv_kernel=config.conv_kernel if config.short_conv else 0,
        conv_bias=config.conv_bias,
        allow_neg_eigval=config.allow_neg_eigval,
        output_gate=config.output_gate,
        norm_eps=config.norm_eps,
    )
