"""Softmax attention over a sequence.

B rows, T queries, S slots (keys), H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output
from altx.spec import BuildContext
from altx.state import State
from altx_attention.cache import GrowingCache, Slots, WindowCache
from altx_attention.config import AttentionConfig
from altx_attention.rotary import angles, rotate


class Attention(Layer):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) with grouped queries, rotary positions and a window.

    Weights start as in GPT-2 (Radford et al. 2019, section 2.3): normal with std 0.02, that of the output divided by
    the square root of the number of residual branches, here two per block; biases at 0.

    Args:
        dim: model width.
        heads: H.
        kv_heads: G (Ainslie et al. 2023); it divides H.
        head_dim: D.
        rope_theta: base of the rotary wavelengths (Su et al. 2021), or None for no positions.
        window: a token sees itself and the window - 1 real tokens before it, and without `ctx.causal` as many
            after it; None for all.
        bias: whether the projections have biases.
        num_layers: number of blocks in the model.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope_theta: float | None = 10000.0,
        window: int | None = None,
        bias: bool = False,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.window = window
        self.cache = WindowCache(kv_heads, head_dim, window) if window else GrowingCache(kv_heads, head_dim)
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        # Without rotation a bias of the keys adds the same to every score of a query, and softmax cancels it.
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias and rope_theta is not None)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=bias)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5 if name == "o_proj.weight" else 0.02)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        weight = self.k_proj.weight
        return self.cache.empty(batch, capacity, device or weight.device, dtype or weight.dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if state is not None and not ctx.causal:
            raise UnsupportedContext(
                "attention that looks both ways needs the whole sequence at once, so it cannot continue a state",
                hint="leave the state out, or use a causal context",
            )
        if not x.shape[1]:
            return Output(x, state)
        if ctx.mask is not None:
            # Whatever a masked token holds, NaN included, stays out of the sums over slots.
            x = x.masked_fill(~ctx.mask[..., None], 0)
        alike = state is None and ctx.mask is None and ctx.reset is None
        # Rows that differ in nothing share their indices, and so one (1, T, T) mask.
        index_BT = ctx.ranks(x[:1] if alike else x, state.seen if state else None)
        q_BTHD, k_BTGD, v_BTGD = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope_theta is not None:
            positions = index_BT if ctx.positions is None else ctx.positions
            turn = angles(positions, self.head_dim, self.rope_theta, x.dtype)
            q_BTHD, k_BTGD = rotate(q_BTHD, turn), rotate(k_BTGD, turn)
        if alike and (self.window is None or x.shape[1] <= self.window):
            return Output(self.o_proj(attend_all(q_BTHD, k_BTGD, v_BTGD, ctx.causal)))
        document_BT = documents(
            ctx, index_BT, self.cache.document(state) if state else index_BT.new_zeros(len(index_BT))
        )
        held_BT = document_BT if ctx.mask is None else document_BT.where(ctx.mask, -1)
        slots = Slots(k_BTGD, v_BTGD, index_BT, held_BT)
        if state is not None:
            state, slots = self.cache.extend(state, slots, ctx)
        visible_BTS = visibility(index_BT, document_BT, slots, ctx.causal, self.window)
        if ctx.mask is not None:
            # Only a masked query can see nothing; let it see anything, since softmax over nothing is NaN.
            visible_BTS = visible_BTS | ~visible_BTS.any(-1, keepdim=True)
        return Output(self.o_proj(attend(q_BTHD, slots.k, slots.v, visible_BTS)), state)


def documents(ctx: Context, index_BT: Tensor, current_B: Tensor) -> Tensor:
    """(B, T) index of the first token of each token's document; `current_B` is where the open ones start."""
    start_BT = current_B[:, None].expand_as(index_BT)
    if ctx.reset is None:
        return start_BT
    first_BT = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
    return index_BT.where(first_BT, start_BT).cummax(1).values


def visibility(index_BT: Tensor, document_BT: Tensor, slots: Slots, causal: bool, window: int | None) -> Tensor:
    """(B, T, S) bool: which slots a query sees: of its own document, not after it if causal, within the window."""
    query, slot = index_BT[:, :, None], slots.index[:, None]
    visible = document_BT[:, :, None] == slots.document[:, None]
    if causal:
        visible = visible & (slot <= query)
    if window is not None:
        visible = visible & (slot > query - window)
        if not causal:
            visible = visible & (slot < query + window)
    return visible


def attend_all(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, causal: bool) -> Tensor:
    """Attention within one whole sequence: (B, T, H * D)."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTGD, v_BTGD))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


def attend(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, visible_BTS: Tensor) -> Tensor:
    """Attention to the visible slots: (B, T, H * D).

    The H / G query heads of a key-value head are laid end to end as its queries, so that no kernel copies keys.
    """
    _, count, heads, _ = q_BTHD.shape
    groups = k_BSGD.shape[2]
    q = q_BTHD.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = (t.to(q.dtype).transpose(1, 2) for t in (k_BSGD, v_BSGD))
    y = F.scaled_dot_product_attention(q, k, v, visible_BTS.repeat(1, heads // groups, 1)[:, None])
    return y.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4).flatten(2)


def build(config: AttentionConfig, ctx: BuildContext) -> Attention:
    return Attention(
        ctx.dim,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_dim=config.width(ctx.dim),
        rope_theta=config.rope_theta if config.rotary else None,
        window=config.window,
        bias=config.bias,
        num_layers=ctx.num_layers,
    )
