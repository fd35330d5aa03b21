"""Multi-scale retention (Sun et al. 2023, arXiv:2307.08621).

B rows, T tokens, D model width, H heads with K key and V value channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.layout import take
from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_kernels.linear_recurrence import linear_recurrence
from altx_linear_attention.heads import scaled
from altx_linear_attention.norms import GatedNorm
from altx_linear_attention.recurrent import Recurrent, real
from altx_linear_attention.retnet_config import RetNetConfig
from altx_linear_attention.rotary import precise, rotate, turns


class RetNet(Recurrent):
    """Section 2.3: in each head its own decay, queries and keys turned by their position.

        S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t / sqrt(K c_t),    c_t = sum_j (1 - 2^(-5-h))^j
        y_t = W_o (norm(o_t) * silu(W_g x_t)), the norm over each head, without a weight

    c_t is the second normalisation of section 2.1, with j from 0 to the number of tokens before t. The third one, by
    the sum of a row, is left out, as in the recurrent form of the authors' code: but for the epsilon of the norm,
    which cancels all of them, it changes nothing. Parameters have the names and shapes of torchscale.

    Args:
        dim: D.
        heads: H.
        values: H V.
        norm_eps: epsilon of the norm.
    """

    def __init__(self, dim: int, *, heads: int, values: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False)
        self.out_proj = nn.Linear(values, dim, bias=False)
        self.group_norm = GatedNorm(values // heads, eps=norm_eps, affine=False)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        widths = self.q_proj.out_features // self.heads, self.group_norm.width
        return {"kv": ((self.heads, *widths), Leaf(fp32=True)), "scale": ((self.heads,), Leaf(fp32=True))}

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = (
            project(batch.x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        after: dict[str, Tensor] = {}
        log_decay, c, after["scale"] = self._decay(batch, state)
        width = q.shape[-1]
        frequencies = 10000.0 ** -torch.linspace(0, 1, width // 2, dtype=precise(q.device), device=q.device)
        turn = turns(positions(batch, ctx, state), frequencies, torch.promote_types(q.dtype, torch.float32))[:, :, None]
        q = rotate(q, turn * (width * c).rsqrt()[..., None])
        k = real(rotate(k, turn), batch)
        o, after["kv"] = linear_recurrence(
            q, k, v, log_decay, initial_state=state["kv"] if state else None, reset=batch.reset
        )
        y: Tensor = self.out_proj(self.group_norm(o, self.g_proj(batch.x)))
        return y, after

    def _decay(self, batch: RealFirst, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log decay (B, T, H), c (B or 1, T, H), and c after the last token (B, H)."""
        x = batch.x
        rows, length, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        lost = 2.0 ** -(5 + torch.arange(self.heads, dtype=precise(x.device), device=x.device))
        log_decay = torch.log1p(-lost)
        steps = torch.arange(length, device=x.device)[None]
        if batch.reset is None:
            count, carried = steps + 1, torch.ones_like(steps, dtype=torch.bool)
        else:
            start = torch.where(batch.reset, steps, -1).cummax(1).values
            count, carried = steps - start.clamp(min=0) + 1, start < 0
        grown = count[..., None] * log_decay
        c = -torch.expm1(grown) / lost
        before = x.new_zeros(rows, self.heads, dtype=wide) if state is None else state["scale"]
        if state is not None:
            c = c + torch.where(carried[..., None], grown.exp(), 0) * before[:, None]
        if batch.lengths is None:
            last = c[:, -1].expand(rows, -1)
        else:
            at = (batch.lengths - 1).clamp(min=0)[:, None]
            last = take(c.expand(rows, -1, -1), at)[:, 0]
            last = torch.where(batch.lengths[:, None] > 0, last, before.to(c.dtype))
        decays = real(log_decay.to(wide).expand(rows, length, -1), batch)
        return decays, c.to(wide), last.to(before.dtype, copy=True)


def positions(batch: RealFirst, ctx: Context, state: State | None) -> Tensor:
    """(B or 1, T) int64, in the order of `batch`."""
    if ctx.positions is None:
        steps = torch.arange(batch.x.shape[1], device=batch.x.device)[None]
        return steps if state is None or state.seen is None else steps + state.seen[:, None]
    return ctx.positions if batch.back is None else take(ctx.positions, batch.back.argsort(1))


def build(config: RetNetConfig, ctx: BuildContext) -> RetNet:
    return RetNet(
        ctx.dim,
        heads=config.count(ctx.dim),
        values=scaled(ctx.dim, config.expand_v, "expand_v"),
        norm_eps=config.norm_eps,
    )
