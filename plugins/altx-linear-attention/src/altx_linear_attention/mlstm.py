"""mLSTM (Beck et al. 2024, xLSTM, arXiv:2405.04517), as in xLSTM 7B (Beck et al. 2025, arXiv:2503.13427).

B rows, T tokens, D model width, H heads with K key and V value channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_linear_attention.heads import scaled
from altx_linear_attention.mlstm_cell import HeadNorm, cell, leaves, soft_cap
from altx_linear_attention.mlstm_config import MLSTMConfig
from altx_linear_attention.mlstm_pre_up import PreUpMLSTM
from altx_linear_attention.recurrent import Recurrent


class MLSTM(Recurrent):
    """Equations 19 to 27 of xLSTM in the block of xLSTM 7B: a matrix memory with exponential input gates.

        C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T,    n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
        h_t = C_t^T q_t / max(|n_t . q_t|, 1),    y_t = W_o (sigmoid(W_g x_t) * norm(h_t)), the norm over each head

    computed and kept as C exp(-m) and n exp(-m), with m_t = max(log sigmoid(f_t) + m_{t-1}, i_t), so that nothing
    overflows. q is divided by sqrt(K). Gates are one number per head, soft-capped. Parameters have the names and
    shapes of transformers' `xLSTMLayer`.

    Args:
        dim: D.
        heads: H.
        keys, values: H K and H V.
        gate_soft_cap, eps, norm_eps, bias: see `MLSTMConfig`.
        num_layers: number of blocks in the model.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        keys: int,
        values: int,
        gate_soft_cap: float | None,
        eps: float,
        norm_eps: float,
        bias: bool,
        num_layers: int,
    ) -> None:
        super().__init__()
        self.heads, self.gate_soft_cap, self.eps = heads, gate_soft_cap, eps
        self.q = nn.Linear(dim, keys, bias=bias)
        self.k = nn.Linear(dim, keys, bias=bias)
        self.v = nn.Linear(dim, values, bias=bias)
        self.ogate_preact = nn.Linear(dim, values, bias=bias)
        self.igate_preact = nn.Linear(dim, heads)
        self.fgate_preact = nn.Linear(dim, heads)
        self.multihead_norm = HeadNorm(heads, values // heads, eps=norm_eps, bias=bias)
        self.out_proj = nn.Linear(values, dim, bias=bias)
        self._initialise(dim, num_layers)

    @torch.no_grad()
    def _initialise(self, dim: int, num_layers: int) -> None:
        """As transformers does: gates are at first the same for all tokens, and hardly open."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "gate" in name:
                nn.init.zeros_(parameter)
        for layer in (self.q, self.k, self.v):
            nn.init.normal_(layer.weight, std=(2 / (5 * dim)) ** 0.5)
        nn.init.normal_(self.out_proj.weight, std=2 / num_layers / dim**0.5)
        self.igate_preact.bias.fill_(-10.0)
        self.fgate_preact.bias.copy_(torch.linspace(3.0, 6.0, self.heads))

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        keys, values = self.q.out_features // self.heads, self.v.out_features // self.heads
        return leaves(self.heads, keys, values)

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.x
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v))
        i, f = (soft_cap(gate(x), self.gate_soft_cap) for gate in (self.igate_preact, self.fgate_preact))
        h, after = cell(q, k, v, i, f, batch, state, eps=self.eps)
        y: Tensor = self.out_proj(torch.sigmoid(self.ogate_preact(x)) * self.multihead_norm(h))
        return y, after


def build(config: MLSTMConfig, ctx: BuildContext) -> MLSTM | PreUpMLSTM:
    if config.block == "pre-up":
        return PreUpMLSTM(
            ctx.dim,
            inner=config.inner(ctx.dim),
            heads=config.count,
            qkv_block=config.qkv_block,
            conv_kernel=config.conv_kernel,
            gate_soft_cap=config.cap,
            eps=config.eps,
            norm_eps=config.epsilon,
            bias=config.bias,
            num_layers=ctx.num_layers,
        )
    return MLSTM(
        ctx.dim,
        heads=config.count,
        keys=scaled(ctx.dim, config.qk_dim_factor, "qk_dim_factor"),
        values=scaled(ctx.dim, config.v_dim_factor, "v_dim_factor"),
        gate_soft_cap=config.cap,
        eps=config.eps,
        norm_eps=config.epsilon,
        bias=config.bias,
        num_layers=ctx.num_layers,
    )
