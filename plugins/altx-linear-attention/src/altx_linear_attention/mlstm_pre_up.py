"""mLSTM in the block of its first paper (Beck et al. 2024, xLSTM, arXiv:2405.04517, figure 11).

B rows, T tokens, D model width, E inner width, H heads of width K.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.masking import RealFirst
from altx.state import Leaf, State
from altx_linear_attention.mlstm_cell import HeadNorm, cell, leaves, soft_cap
from altx_linear_attention.recurrent import Recurrent
from altx_linear_attention.short_conv import ShortConv

WIDTH = 64
"""Channels that the block-diagonal projections multiply at once: what a matrix product is worth calling for."""


class PreUpMLSTM(Recurrent):
    """Up-projection, short convolution, cell, skip, gate, down-projection.

        [u | z] = W_up x,    c = silu(conv(u)),    q, k = W_q c, W_k c,    v = W_v u
        h = norm(cell(q, k, v, i, f)) + skip c,    y = W_down (h * silu(z)),    i and f of [q | k | v]

    W_q, W_k and W_v are block-diagonal. Parameters have the names and shapes of `mLSTMLayer` of NX-AI/xlstm, but that
    the convolution's are not those of a `conv` within it.

    Args:
        dim: D.
        inner: E.
        heads: H.
        qkv_block, conv_kernel, gate_soft_cap, eps, norm_eps, bias: see `MLSTMConfig`.
        num_layers: number of blocks in the model.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: int,
        heads: int,
        qkv_block: int,
        conv_kernel: int,
        gate_soft_cap: float | None,
        eps: float,
        norm_eps: float,
        bias: bool,
        num_layers: int,
    ) -> None:
        super().__init__()
        self.heads, self.gate_soft_cap, self.eps = heads, gate_soft_cap, eps
        self.proj_up = nn.Linear(dim, 2 * inner, bias=bias)
        self.q_proj, self.k_proj, self.v_proj = (BlockDiagonal(inner, qkv_block, bias=bias) for _ in range(3))
        self.conv1d = ShortConv(inner, conv_kernel, bias=True)
        self.mlstm_cell = GatesAndNorm(inner, heads, norm_eps)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, dim, bias=bias)
        self._initialise(dim, num_layers)

    @torch.no_grad()
    def _initialise(self, dim: int, num_layers: int) -> None:
        """As in the authors' code, where it departs from torch."""
        for layer in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(layer.weight, std=(2 / (5 * dim)) ** 0.5)
        nn.init.normal_(self.proj_down.weight, std=2 / num_layers / dim**0.5)
        for gate in (self.mlstm_cell.igate, self.mlstm_cell.fgate):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.mlstm_cell.igate.bias, std=0.1)
        self.mlstm_cell.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.heads))
        for layer in (self.proj_up, self.proj_down):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        width = self.proj_down.in_features // self.heads
        return leaves(self.heads, width, width)

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        convolved: dict[str, Tensor] = {}
        u, z = self.proj_up(batch.x).chunk(2, -1)
        c = self.convolve("conv1d", u, batch, state, convolved)
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(u)
        gates = torch.cat([q, k, v], -1)
        i, f = (soft_cap(gate(gates), self.gate_soft_cap) for gate in (self.mlstm_cell.igate, self.mlstm_cell.fgate))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        h, after = cell(q, k, v, i, f, batch, state, eps=self.eps)
        h = torch.addcmul(self.mlstm_cell.outnorm(h), self.learnable_skip, c)
        y: Tensor = self.proj_down(h * F.silu(z))
        return y, {**after, **convolved}


class GatesAndNorm(nn.Module):
    """What the authors' code has within its cell.

    Args:
        inner, heads: E and H.
        norm_eps: epsilon of the norm.
    """

    def __init__(self, inner: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.igate = nn.Linear(3 * inner, heads)
        self.fgate = nn.Linear(3 * inner, heads)
        self.outnorm = HeadNorm(heads, inner // heads, eps=norm_eps, bias=False, offset=1.0)


class BlockDiagonal(nn.Module):
    """A linear map among blocks of neighbouring channels: each block has its own square matrix.

    Args:
        channels: E.
        block: channels of a block.
        bias: whether there is one.
    """

    def __init__(self, channels: int, block: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels // block, block, block))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> (B, T, E)."""
        blocks, block, _ = self.weight.shape
        # Several blocks become one larger block-diagonal matrix, mostly zeros, which is still the faster product.
        together = max(n for n in range(1, max(WIDTH // block, 1) + 1) if blocks % n == 0)
        weight = self.weight.unflatten(0, (-1, together))
        eye = torch.eye(together, device=weight.device, dtype=weight.dtype)
        weight = torch.einsum("gtoi,ts->gtosi", weight, eye).flatten(3).flatten(1, 2)
        y = torch.einsum("btgi,goi->btgo", x.unflatten(-1, (weight.shape[0], -1)), weight).flatten(2)
        return y if self.bias is None else y + self.bias
