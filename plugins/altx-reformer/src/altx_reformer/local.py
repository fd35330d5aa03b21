"""Attention within chunks of the sequence, and to the chunks next to them.

B rows, T tokens, S slots, H heads, D head width, c chunk size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output
from altx.masking import real_first
from altx.spec import BuildContext
from altx.state import State
from altx_reformer.cache import documents
from altx_reformer.config import LocalConfig, local_capabilities
from altx_reformer.rotary import rotate
from altx_reformer.window import Slots, WindowCache


class LocalAttention(Layer):
    """Local self-attention of Reformer (Kitaev et al. 2020, section 5; LocalSelfAttention in transformers).

    The real tokens of a sequence are cut into chunks of c; a token sees its own chunk, `before` chunks in front of it
    and, without `ctx.causal`, `after` chunks behind it. The first chunk does not see the last, as it does in
    transformers without a decoder's mask. Parameters start as `nn.Linear` has them.

    Args:
        dim: model width.
        config: settings.
    """

    def __init__(self, dim: int, config: LocalConfig) -> None:
        super().__init__()
        self.config = config
        self.capabilities = local_capabilities(config)
        self.width = config.width(dim)
        inner = config.heads * self.width
        self.query = nn.Linear(dim, inner, bias=False)
        self.key = nn.Linear(dim, inner, bias=False)
        self.value = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=config.out_bias)
        self.cache = WindowCache(config.heads, self.width, (1 + config.before) * config.chunk_size)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        weight = self.key.weight
        return self.cache.empty(batch, device or weight.device, dtype or weight.dtype)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if state is not None and not ctx.causal:
            raise UnsupportedContext(
                "attention that looks both ways needs the whole sequence at once, so it cannot continue a state",
                hint="leave the state out, or use a causal context",
            )
        if not x.shape[1] or not x.shape[0]:
            return Output(x, state)
        real = real_first(x, ctx)
        moved = Context(mask=real.mask, reset=real.reset)
        # Rows that differ in nothing share what is visible.
        alike = state is None and real.mask is None and real.reset is None
        index_BT = moved.ranks(x[:1] if alike else x, state.seen if state else None)
        q, k, v = (proj(real.x).unflatten(-1, (-1, self.width)) for proj in (self.query, self.key, self.value))
        if self.config.rotary:
            positions = index_BT
            if ctx.positions is not None:
                positions = real_first(ctx.positions[..., None], ctx.replace(reset=None)).x[..., 0]
            q, k = (rotate(t, positions, self.config.rope_theta) for t in (q, k))
        current = self.cache.document(state) if state else index_BT.new_zeros(len(index_BT))
        document_BT = documents(moved, index_BT, current)
        held_BT = document_BT if real.mask is None else document_BT.where(real.mask, -1)
        slots = Slots(k, v, index_BT, held_BT)
        front = 0
        if state is not None:
            state, slots, front = self.cache.extend(state, slots, real.mask)
        y = self.attend(q, index_BT, document_BT, slots, front, causal=ctx.causal, grid=alike)
        return Output(self.to_out(real.restore(y)), state)

    def attend(
        self, q: Tensor, index_BT: Tensor, document_BT: Tensor, slots: Slots, front: int, *, causal: bool, grid: bool
    ) -> Tensor:
        """Attention of q (B, T, H, D) to its chunks: (B, T, H * D).

        Args:
            q: queries of the last T slots.
            index_BT: index of each query among its row's real tokens; the first axis may be 1.
            document_BT: index of the first token of its document.
            slots: what there is to see, of which the first `front` are older than the queries.
            front: as said.
            causal: whether no query sees a later slot.
            grid: blocks of queries are chunks; else chunks may begin anywhere.
        """
        size, before, after = self.config.chunk_size, self.config.before, 0 if causal else self.config.after
        length = q.shape[1]
        block = min(size, length)
        extra = -length % block
        odd = 0 if grid else size - 1
        lead, trail = before * size + odd, (after * size + odd) * (not causal)
        window = lead + block + trail

        def padded(x: Tensor, value: int = 0) -> Tensor:
            """Slots (.., S, ...) with exactly `lead` in front of the queries' first, and enough behind their last."""
            need = lead - front
            x = x[:, max(-need, 0) :]
            return F.pad(x, (0, 0) * (x.dim() - 2) + (max(need, 0), extra + trail), value=value)

        def windows(x: Tensor) -> Tensor:
            """(B, N, ..., w): what the N blocks of queries may look at."""
            return x.unfold(1, window, block)

        k, v = (windows(padded(t.to(q.dtype))).permute(0, 1, 2, 4, 3).flatten(0, 1) for t in (slots.k, slots.v))
        index, document = windows(padded(slots.index)), windows(padded(slots.document, -1))

        def asked(x: Tensor) -> Tensor:
            blocks: Tensor = F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra)).unflatten(1, (-1, block))
            return blocks

        mine, own = asked(index_BT)[..., None], asked(document_BT)[..., None]
        index, document = index[:, :, None], document[:, :, None]
        ahead = (index - document).div(size, rounding_mode="floor") - (mine - own).div(size, rounding_mode="floor")
        visible = (document == own) & (ahead >= -before)
        visible = visible & (index <= mine if causal else ahead <= after)
        # Only padding can see nothing; let it see anything, since softmax over nothing is NaN.
        visible = visible | ~visible.any(-1, keepdim=True)
        shown = visible.expand(len(q), -1, -1, -1).flatten(0, 1)[:, None]
        y = F.scaled_dot_product_attention(asked(q).flatten(0, 1).transpose(1, 2), k, v, shown)
        y_BTE: Tensor = y.transpose(1, 2).unflatten(0, (len(q), -1)).flatten(1, 2)[:, :length].flatten(2)
        return y_BTE


def build(config: LocalConfig, ctx: BuildContext) -> LocalAttention:
    return LocalAttention(ctx.dim, config)
