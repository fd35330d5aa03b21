"""mLSTM (Beck et al. 2024, xLSTM, arXiv:2405.04517), as in xLSTM 7B (Beck et al. 2025, arXiv:2503.13427).

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
from altx_linear_attention.heads import scaled
from altx_linear_attention.mlstm_config import MLSTMConfig
from altx_linear_attention.recurrent import Recurrent, real


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
        return {"cn": ((self.heads, keys, values + 1), Leaf(fp32=True)), "m": ((self.heads,), Leaf(fp32=True))}

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.x
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v))
        i = real(self._cap(self.igate_preact(x)), batch, -torch.inf)
        f = real(F.logsigmoid(self._cap(self.fgate_preact(x))), batch)
        before = i.new_zeros(x.shape[0], self.heads) if state is None else state["m"].detach()
        m, held = stabilisers(f.detach(), i.detach(), before.to(i.dtype), batch.reset)
        q = q * q.shape[-1] ** -0.5
        k = k * torch.exp(i - m)[..., None].to(k.dtype)
        # n is one more column of C, that of a value which is always 1.
        o, cn = linear_recurrence(
            q, k, F.pad(v, (0, 1), value=1.0), f + held - m,
            initial_state=state["cn"] if state else None, reset=batch.reset,
        )  # fmt: skip
        scale = torch.maximum(o[..., -1:].abs(), torch.exp(-m)[..., None]) + self.eps
        h = self.multihead_norm(o[..., :-1] / scale.to(o.dtype))
        y: Tensor = self.out_proj(torch.sigmoid(self.ogate_preact(x)) * h)
        return y, {"cn": cn, "m": m[:, -1].clone()}

    def _cap(self, gate: Tensor) -> Tensor:
        """The projection of a gate (B, T, H), soft-capped, in float32 at least."""
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        return gate if self.gate_soft_cap is None else self.gate_soft_cap * torch.tanh(gate / self.gate_soft_cap)


class HeadNorm(nn.Module):
    """LayerNorm of each head, with a weight and perhaps a bias for every channel of all heads.

    Args:
        heads, width: H and V.
        eps: added to the variance.
        bias: whether there is one.
    """

    def __init__(self, heads: int, width: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * width))
        self.bias = nn.Parameter(torch.zeros(heads * width)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, H V) from h (B, T, H, V)."""
        y = F.layer_norm(h, h.shape[-1:], eps=self.eps).flatten(2) * self.weight
        return y if self.bias is None else y + self.bias


def stabilisers(f: Tensor, i: Tensor, before: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """m_t = max(f_t + m_{t-1}, i_t) of every token, and m_{t-1}, which is 0 where a sequence starts.

    Doubles its reach log2(T) times: what a run of tokens does to m is again to add something and to take a maximum.

    Args:
        f: (B, T, H), log forget gates.
        i: (B, T, H), input gates before exp.
        before: (B, H), m before the first token.
        reset: (B, T) bool, where a sequence starts.

    Returns:
        m_t and m_{t-1}, (B, T, H).
    """
    first = before if reset is None else before.masked_fill(reset[:, :1], 0)
    added = f
    if reset is not None:
        # Nothing before a start counts, but the 0 that it starts from.
        i = torch.where(reset[..., None], torch.maximum(i, f), i)
        added = added.masked_fill(reset[..., None], -torch.inf)
    m = torch.cat([torch.maximum(i[:, :1], f[:, :1] + first[:, None]), i[:, 1:]], 1)
    reach = 1
    while reach < m.shape[1]:
        m = torch.cat([m[:, :reach], torch.maximum(m[:, reach:], m[:, :-reach] + added[:, reach:])], 1)
        added = torch.cat([added[:, :reach], added[:, reach:] + added[:, :-reach]], 1)
        reach *= 2
    held = torch.cat([first[:, None], m[:, :-1]], 1)
    return m, held if reset is None else held.masked_fill(reset[..., None], 0)


def build(config: MLSTMConfig, ctx: BuildContext) -> MLSTM:
    return MLSTM(
        ctx.dim,
        heads=config.heads,
        keys=scaled(ctx.dim, config.qk_dim_factor, "qk_dim_factor"),
        values=scaled(ctx.dim, config.v_dim_factor, "v_dim_factor"),
        gate_soft_cap=config.gate_soft_cap,
        eps=config.eps,
        norm_eps=config.norm_eps,
        bias=config.bias,
        num_layers=ctx.num_layers,
    )
