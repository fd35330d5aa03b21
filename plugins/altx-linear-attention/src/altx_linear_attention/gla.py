"""Gated linear attention (Yang et al. 2023, arXiv:2312.06635).

B rows, T tokens, D model width, H heads with K key and V value channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_kernels.linear_recurrence import linear_recurrence
from altx_linear_attention.gla_config import GLAConfig
from altx_linear_attention.heads import scaled
from altx_linear_attention.norms import GatedNorm
from altx_linear_attention.recurrent import Recurrent, real
from altx_linear_attention.short_conv import ShortConv


class GLA(Recurrent):
    """The token mixer of section 4.4: a decay for every key channel, computed from the token.

        a_t = sigmoid(W_2 W_1 x_t + b)^(1 / normalizer),    S_t = diag(a_t) S_{t-1} + k_t v_t^T
        o_t = S_t^T q_t / sqrt(K),    y_t = W_o (norm(o_t) * silu(W_g x_t)), the norm over each head

    Parameters have the names and shapes of fla's `GatedLinearAttention`.

    Args:
        dim: D.
        heads: H.
        keys, values: H K and H V.
        gate_rank, gate_normalizer, gate_min, output_gate, norm_eps: see `GLAConfig`.
        conv_kernel: taps of the short convolutions, or None for none.
        conv_bias: whether these have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        keys: int,
        values: int,
        gate_rank: int,
        gate_normalizer: float,
        gate_min: float | None,
        output_gate: bool,
        conv_kernel: int | None,
        conv_bias: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.gate_normalizer, self.gate_min = heads, gate_normalizer, gate_min
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False) if output_gate else None
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            ShortConv(channels, conv_kernel, bias=conv_bias) if conv_kernel else None
            for channels in (keys, keys, values)
        )
        down, up = nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, keys)
        self.gk_proj = nn.Sequential(down, up)
        self.o_proj = nn.Linear(values, dim, bias=False)
        # fla has two names for it.
        self.g_norm_swish_gate = GatedNorm(values // heads, eps=norm_eps) if output_gate else None
        self.g_norm = None if output_gate else GatedNorm(values // heads, eps=norm_eps)
        # As in the authors' code; all other weights start as torch's do.
        for layer in (self.q_proj, self.k_proj, down, up):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        widths = self.q_proj.out_features // self.heads, self.v_proj.out_features // self.heads
        return {"kv": ((self.heads, *widths), Leaf(fp32=True))}

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        after: dict[str, Tensor] = {}
        q, k, v = (
            self.convolve(f"{name}_conv1d", project(batch.x), batch, state, after).unflatten(-1, (self.heads, -1))
            for name, project in (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj))
        )
        g = self._log_decay(batch).unflatten(-1, (self.heads, -1))
        q = q * q.shape[-1] ** -0.5
        o, after["kv"] = linear_recurrence(
            q, real(k, batch), v, real(g, batch), initial_state=state["kv"] if state else None, reset=batch.reset
        )
        norm = self.g_norm_swish_gate or self.g_norm
        assert norm is not None
        y: Tensor = self.o_proj(norm(o, None if self.g_proj is None else self.g_proj(batch.x)))
        return y, after

    def _log_decay(self, batch: RealFirst) -> Tensor:
        """log a (B, T, H K), in float32 at least."""
        g = self.gk_proj(batch.x)
        g = F.logsigmoid(g.to(torch.promote_types(g.dtype, torch.float32))) / self.gate_normalizer
        return g if self.gate_min is None else g.clamp(min=self.gate_min)


def build(config: GLAConfig, ctx: BuildContext) -> GLA:
    return GLA(
        ctx.dim,
        heads=config.heads,
        keys=scaled(ctx.dim, config.expand_k, "expand_k"),
        values=scaled(ctx.dim, config.expand_v, "expand_v"),
        gate_rank=config.gate_rank,
        gate_normalizer=config.gate_normalizer,
        gate_min=config.gate_min,
        output_gate=config.output_gate,
        conv_kernel=config.conv_kernel if config.short_conv else None,
        conv_bias=config.conv_bias,
        norm_eps=config.norm_eps,
    )
