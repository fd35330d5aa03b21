"""DeltaNet: a linear attention that corrects what it recalls (Yang et al. 2024, arXiv:2406.06484)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from altx.spec import BuildContext
from altx_linear_attention.delta import DeltaMixer, initialise
from altx_linear_attention.deltanet_config import DeltaNetConfig
from altx_linear_attention.norms import GatedNorm


class DeltaNet(DeltaMixer):
    """The layer of section 3.3, which trains the rule of Schlag et al. 2021 (arXiv:2102.11174) in parallel.

        S_t = (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = q_t S_t / sqrt(K)
        q, k = l2norm(silu(conv(W x))),    v = silu(conv(W_v x)),    beta = sigmoid(W_b x),    y = W_o norm(o)

    Parameters have the names and shapes of flash-linear-attention's layer, so its checkpoints fit.

    Args:
        dim: D.
        qk_activation: in place of silu for q and k.
        qk_norm: "l2", or "sum": q and k divided by the sum of their channels.
        output_gate: whether norm(o) is gated by silu(W_g x).
        norm_eps: added to the mean square of a head's output.
        sizes: as for `DeltaMixer`.
    """

    def __init__(
        self, dim: int, *, qk_activation: str, qk_norm: str, output_gate: bool, norm_eps: float, **sizes: Any
    ) -> None:
        norm = GatedNorm(sizes["value_dim"], eps=norm_eps)
        super().__init__(dim, norm=norm, qk_silu=qk_activation == "silu", **sizes)
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
        self.g_proj = nn.Linear(dim, self.v_proj.out_features, bias=False) if output_gate else None
        initialise(self)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.qk_activation == "relu":
            q, k = F.relu(q), F.relu(k)
        elif self.qk_activation == "elu":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.qk_norm == "l2":
            return super().features(q, k)
        q, k = (x / x.sum(-1, keepdim=True) for x in (q, k))
        return q * self.head_dim**-0.5, k

    def gate(self, x: Tensor) -> Tensor | None:
        return None if self.g_proj is None else self.g_proj(x)


def build(config: DeltaNetConfig, ctx: BuildContext) -> DeltaNet:
    heads, head_dim, value_dim = config.sizes(ctx.dim)
    return DeltaNet(
        ctx.dim,
        heads=heads,
        head_dim=head_dim,
        value_heads=heads,
        value_dim=value_dim,
        conv_kernel=config.conv_kernel if config.short_conv else 0,
        conv_bias=config.conv_bias,
        allow_neg_eigval=config.allow_neg_eigval,
        qk_activation=config.qk_activation,
        qk_norm=config.qk_norm,
        output_gate=config.output_gate,
        norm_eps=config.norm_eps,
    )
