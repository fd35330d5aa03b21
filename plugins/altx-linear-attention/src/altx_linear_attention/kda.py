"""Kimi Delta Attention: a delta rule with a decay for every key channel (Kimi Team 2025, arXiv:2510.26692)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.spec import BuildContext
from altx_linear_attention.delta import UNDECAYED, DeltaMixer, initial_A_log, initial_dt_bias
from altx_linear_attention.kda_config import KDAConfig
from altx_linear_attention.norms import GatedNorm


class KDA(DeltaMixer):
    """Equation 1, in the layer of section 4.

        S_t = (1 - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,    o_t = q_t S_t / sqrt(K)
        q, k = l2norm(silu(conv(W x))),    v = silu(conv(W_v x)),    y = W_o (norm(o) * sigmoid(W_gb W_ga x))
        beta = sigmoid(W_b x),    alpha = exp(-A softplus(W_fb W_fa x + dt_bias)),    W_fa, W_ga of rank K

    Parameters have the names of Kimi Linear's checkpoints; `altx_linear_attention.convert` renames those of
    transformers and of flash-linear-attention.

    Args:
        dim: D.
        gate_bias: whether W_gb has a bias.
        norm_eps: added to the mean square of a head's output.
        sizes: as for `DeltaMixer`.
    """

    def __init__(self, dim: int, *, gate_bias: bool, norm_eps: float, **sizes: Any) -> None:
        rank = sizes["head_dim"]
        super().__init__(dim, norm=GatedNorm(sizes["value_dim"], eps=norm_eps, gate="sigmoid"), **sizes)
        keys, values = self.k_proj.out_features, self.v_proj.out_features
        self.f_a_proj = nn.Linear(dim, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, keys, bias=False)
        self.A_log = nn.Parameter(initial_A_log(self.value_heads, 1))
        self.dt_bias = nn.Parameter(initial_dt_bias(keys))
        self.g_a_proj = nn.Linear(dim, rank, bias=False)
        self.g_b_proj = nn.Linear(rank, values, bias=gate_bias)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        return UNDECAYED

    def decay(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(self.f_b_proj(self.f_a_proj(x)).to(wide) + self.dt_bias)
        decay: Tensor = dt.unflatten(-1, (-1, self.head_dim)) * -self.A_log.to(wide).exp()[:, None]
        return decay

    def gate(self, x: Tensor) -> Tensor:
        gate: Tensor = self.g_b_proj(self.g_a_proj(x))
        return gate


def build(config: KDAConfig, ctx: BuildContext) -> KDA:
    heads, head_dim = config.sizes(ctx.dim)
    return KDA(
        ctx.dim,
        heads=heads,
        head_dim=head_dim,
        value_heads=heads,
        value_dim=head_dim,
        conv_kernel=config.conv_kernel if config.short_conv else 0,
        conv_bias=config.conv_bias,
        allow_neg_eigval=config.allow_neg_eigval,
        gate_bias=config.gate_bias,
        norm_eps=config.norm_eps,
    )
