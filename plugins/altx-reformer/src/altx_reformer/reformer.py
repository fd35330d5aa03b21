"""Attention among tokens that locality-sensitive hashing puts together.

B rows, T tokens, S slots of a state, H heads, D head width, R rounds of hashing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output
from altx.layout import append, repack, take, unpack
from altx.spec import BuildContext
from altx.state import State
from altx_reformer import cache
from altx_reformer.attend import attend
from altx_reformer.config import ReformerConfig, capabilities
from altx_reformer.few import attend_few
from altx_reformer.hashing import hashed, rotations
from altx_reformer.order import NOWHERE, Order, in_chunks, within_buckets
from altx_reformer.rotary import rotate

FEW = 1 << 12
"""Up to so many pairs of new token and slot, they are all compared; beyond, tokens are sorted again."""


class Reformer(Layer):
    """LSH self-attention with shared queries and keys (Kitaev et al. 2020, section 2).

    Parameters are named and start as in reformer-pytorch's LSHSelfAttention: those of `nn.Linear`. `rotations`, a
    buffer, is saved with them. Where `ctx.generator` is given in training, every call without a state hashes with
    fresh rotations from it, as published; all other calls use the buffer, so that a sequence goes on as it began.

    Args:
        dim: model width.
        config: settings.
        layer: index of the block, which varies the rotations.
    """

    rotations: Tensor

    def __init__(self, dim: int, config: ReformerConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        self.width = config.width(dim)
        inner = config.heads * self.width
        self.toqk = nn.Linear(dim, inner, bias=False)
        self.tov = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=config.out_bias)
        # Not one seed next to the other: models with seeds 0 and 1 would share the rotations of all blocks but one.
        generator = torch.Generator().manual_seed(config.hash_seed * 1_000_003 + layer)
        self.register_buffer("rotations", self.draw(generator, self.toqk.weight.device))

    def draw(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """Rotations: (H or 1, D, R, half the buckets)."""
        config = self.config
        heads = config.heads if config.rotations_per_head else 1
        return rotations(heads, self.width, config.n_hashes, config.factors, generator, device)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | None:
        if self.capabilities.streaming == "none":
            return None
        weight, config = self.toqk.weight, self.config
        return cache.empty(
            batch, capacity or 0, config.heads, self.width, config.n_hashes,
            device or weight.device, dtype or weight.dtype,
        )  # fmt: skip

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        causal = ctx.causal and self.config.chunking == "causal"
        if state is not None and not causal:
            raise UnsupportedContext(
                "LSH attention in published chunks, or in both directions, needs the whole sequence at once, so it "
                "cannot continue a state",
                hint="leave the state out, or use a causal context with chunking: causal",
            )
        if not x.shape[1] or not x.shape[0]:
            return Output(x, state)
        if not causal and ctx.reset is not None:
            return Output(self.by_document(x, ctx))
        if ctx.mask is not None:
            # Whatever a masked token holds, NaN included, stays out of every sum.
            x = x.masked_fill(~ctx.mask[..., None], 0)
        index_BT = ctx.ranks(x, state.seen if state else None)
        qk_BTHD, v_BTHD = (proj(x).unflatten(-1, (-1, self.width)) for proj in (self.toqk, self.tov))
        table = self.rotations
        if self.training and ctx.generator is not None and state is None:
            table = self.draw(ctx.generator, x.device)
        bucket_BTHR = hashed(qk_BTHD, table, self.config.factors)
        if self.config.rotary:
            positions = index_BT if ctx.positions is None else ctx.positions
            qk_BTHD = rotate(qk_BTHD, positions, self.config.rope_theta)
        k_BTHD = self.keys(qk_BTHD)
        new = cache.Slots(k_BTHD, v_BTHD, bucket_BTHR, index_BT.new_zeros(index_BT.shape))
        with torch.autocast(x.device.type, enabled=False):
            if not causal:
                y_BTHD = self.chunked(qk_BTHD, new, ctx)
            elif state is None:
                document = cache.documents(ctx, index_BT, index_BT.new_zeros(len(index_BT)))
                y_BTHD = self.sorted(qk_BTHD, k_BTHD, v_BTHD, bucket_BTHR, document, ctx.mask)
            else:
                y_BTHD, state = self.continued(qk_BTHD, new, index_BT, ctx, state)
        return Output(self.to_out(y_BTHD.flatten(2).to(v_BTHD.dtype)), state)

    def keys(self, qk_BTHD: Tensor) -> Tensor:
        """Queries brought to length 1, times the scale of the scores."""
        config = self.config
        scale = self.width**-0.5 if config.scale is None else config.scale
        wide = qk_BTHD.to(torch.promote_types(qk_BTHD.dtype, torch.float32))
        if config.norm_eps:
            square = wide.square().mean(-1, keepdim=True)
            k: Tensor = wide * (square + config.norm_eps).rsqrt() * (scale * self.width**-0.5)
        else:
            k = F.normalize(wide, dim=-1) * scale
        return k.to(qk_BTHD.dtype)

    def sorted(
        self, q: Tensor, k: Tensor, v: Tensor, bucket_BTHR: Tensor, document_BT: Tensor, mask_BT: Tensor | None
    ) -> Tensor:
        """Each token to the last ones of its bucket and document: (B, T, H, D)."""
        places = 1
        for factor in self.config.factors:
            places *= factor
        keys = bucket_BTHR + (document_BT * places)[..., None, None]
        order = within_buckets(_pairs(keys, mask_BT), self.config.bucket_size, _block(self.config.bucket_size))
        return _attended(q, k, v, order)

    def chunked(self, q: Tensor, new: cache.Slots, ctx: Context) -> Tensor:
        """Each token to its published chunk and the one before: (B, T, H, D)."""
        config = self.config
        lengths = ctx.lengths(q).repeat_interleave(config.heads)
        order = in_chunks(
            _pairs(new.bucket, ctx.mask), lengths, config.bucket_size,
            across=config.attend_across_buckets, causal=ctx.causal,
            masked=ctx.mask is not None,
        )  # fmt: skip
        return _attended(q, new.k, new.v, order)

    def continued(
        self, q: Tensor, new: cache.Slots, index_BT: Tensor, ctx: Context, state: State
    ) -> tuple[Tensor, State]:
        """Each new token to those of its bucket, new ones and those of the state: (B, T, H, D), and what follows."""
        document_BT = cache.documents(ctx, index_BT, cache.current_document(state))
        new = cache.Slots(new.k, new.v, new.bucket, document_BT)
        start = state
        state, slots = cache.extend(state, new, ctx)
        if q.shape[1] == 1 or q.shape[1] * slots.k.shape[1] <= FEW:
            return attend_few(q, new.bucket, index_BT, document_BT, slots, self.config.bucket_size), state
        assert start.seen is not None and state.seen is not None
        if not ctx.donate_state:
            # Reserved room that is not used yet is not sorted.
            used = int(state.seen.max())
            slots = cache.Slots(*(t[:, :used] for t in (slots.k, slots.v, slots.bucket, slots.document)))
        # Earlier tokens ask, too; what they hear is thrown away.
        asked = append(torch.zeros_like(slots.k, dtype=q.dtype), q, start.seen, ctx.mask)
        real = torch.arange(slots.k.shape[1], device=q.device) < state.seen[:, None]
        y = self.sorted(asked, slots.k, slots.v, slots.bucket, slots.document, real)
        return take(y, index_BT.clamp(min=0)), state

    def by_document(self, x: Tensor, ctx: Context) -> Tensor:
        """A row with resets as so many rows: (B, T, D)."""
        assert ctx.reset is not None
        mask = torch.ones_like(ctx.reset) if ctx.mask is None else ctx.mask
        y = x.new_zeros(x.shape)
        if not bool(mask.any()):
            return y
        index = ctx.ranks(x)
        positions = index if ctx.positions is None else ctx.positions
        starts = ((index == 0) | ctx.reset)[mask].nonzero()[:, 0]
        cu_seqlens = F.pad(starts, (0, 1), value=int(mask.sum()))
        rows, real = unpack(x[mask][None], cu_seqlens)
        alone = ctx.replace(mask=real, reset=None, positions=unpack(positions[mask][None], cu_seqlens)[0], shared={})
        out = self(rows, alone).y
        y = y.to(out.dtype)
        y[mask] = repack(out, real)[0]
        return y


def _attended(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, order: Order) -> Tensor:
    """Attention in an order of the pairs of row and head, in float32 at least: (B, T, H, D)."""
    dtype = torch.promote_types(torch.promote_types(q_BTHD.dtype, k_BTHD.dtype), torch.float32)
    q, k, v = (t.to(dtype).transpose(1, 2).flatten(0, 1) for t in (q_BTHD, k_BTHD, v_BTHD))
    y: Tensor = attend(q, k, v, order).unflatten(0, (-1, q_BTHD.shape[2]))
    return y.transpose(1, 2)


def _block(reach: int) -> int:
    """The divisor of `reach` nearest to its half, where windows overlap little and products are not small."""
    if reach <= 16:
        return reach
    return max(n for n in range(1, reach // 2 + 1) if reach % n == 0)


def _pairs(keys_BTHR: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Sort keys as (B * H, R, T)."""
    if mask_BT is not None:
        keys_BTHR = keys_BTHR.masked_fill(~mask_BT[..., None, None], NOWHERE)
    return keys_BTHR.permute(0, 2, 3, 1).flatten(0, 1)


def build(config: ReformerConfig, ctx: BuildContext) -> Reformer:
    return Reformer(ctx.dim, config, ctx.layer)
