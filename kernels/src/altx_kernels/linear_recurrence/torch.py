"""Linear recurrences in PyTorch, chunk by chunk: anywhere without a compiled kernel.

Within a chunk the state is never formed: o = (M * (q k^T)) v + exp(b) q S, where b_t is the sum of the log decays up
to t, M_ts = exp(b_t - b_s) for s <= t, and S the state before the chunk (SSD, arXiv:2405.21060, section 6; GLA,
arXiv:2312.06635, section 4). With a decay per key channel, M is a matrix per channel and stands inside the product.
Only differences that are <= 0 are exponentiated. Autograd keeps each chunk's arguments and computes the rest again.

Letters as in `reference`, with L tokens in a chunk and R = H / G heads in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast
from altx_kernels.packing import one_by_one

CHUNK = 64
"""Tokens between two states that are kept for the backward pass."""

BLOCK = 16
"""Tokens that are multiplied at once where every key channel decays by itself."""

GONE = -1000.0
"""A log decay whose exponential is 0 in every dtype; stands for a reset and for -inf, whose differences are NaN."""


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.linear_recurrence`."""
    if cu_seqlens is not None:
        return one_by_one(
            linear_recurrence, cu_seqlens, {"q": q, "k": k, "v": v, "g": g, "reset": reset}, initial_state
        )
    dtype = precise(q, k, v, g, initial_state)
    shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    S = v.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype).clone()
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, initial_state))
    os = []
    for start in range(0, v.shape[1], CHUNK):
        q_, k_, v_, g_, reset_ = (None if x is None else x[:, start : start + CHUNK] for x in (q, k, v, g, reset))
        with no_autocast(v.device):
            if wanted and v.shape[1] > 1:
                o, S = checkpoint(_chunk, q_, k_, v_, g_, reset_, S, use_reentrant=False, preserve_rng_state=False)
            else:
                assert q_ is not None and k_ is not None and v_ is not None
                o, S = _chunk(q_, k_, v_, g_, reset_, S)
        os.append(o)
    return (torch.cat(os, 1) if os else v.clone()), S


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk from its arguments (B, L, ...) and the state before it: o (B, L, H, V) and the state after it."""
    out = v.dtype
    q, k, v = (x.to(S.dtype).transpose(1, 2) for x in (q, k, v))
    # float64, for sums are subtracted from each other; Apple's GPUs have none.
    wide = torch.float32 if v.device.type == "mps" else torch.float64
    if g is not None:
        g = g.to(wide).clamp(min=GONE).transpose(1, 2)
    if reset is not None:
        if g is None:
            g = v.new_zeros(v.shape[:3], dtype=wide)
        at = reset[:, None] if g.dim() == 3 else reset[:, None, :, None]
        g = torch.where(at, GONE, g)
    if g is None or g.dim() == 3:
        o, S = _per_head(q, k, v, g, S)
    else:
        os = []
        heads = v.shape[1] // q.shape[1]
        q, k = (x.repeat_interleave(heads, 1) for x in (q, k))
        for start in range(0, v.shape[2], BLOCK):
            now = slice(start, start + BLOCK)
            o, S = _per_channel(q[:, :, now], k[:, :, now], v[:, :, now], g[:, :, now], S)
            os.append(o)
        o = torch.cat(os, 2)
    return o.transpose(1, 2).to(out), S


def _per_head(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """No decay, or one per head: q, k (B, G, L, K), v (B, H, L, V), g (B, H, L)."""
    batch, groups, length = q.shape[:3]
    v = v.unflatten(1, (groups, -1))
    heads, values = v.shape[2], v.shape[4]
    scores = (q @ k.mT)[:, :, None]
    # The states of a group's heads side by side, (B, G, K, R V), so that its q and k are multiplied once.
    S = S.unflatten(1, (groups, heads)).transpose(2, 3).flatten(3)
    read = (q @ S).view(batch, groups, length, heads, values).transpose(2, 3)
    if g is None:
        o, kept = scores.tril() @ v + read, v
    else:
        b = g.unflatten(1, (groups, heads)).cumsum(-1)
        o = (scores * _exp(_past(b[..., :, None] - b[..., None, :]), v)) @ v + read * _exp(b, v)[..., None]
        kept = v * _exp(b[..., -1:] - b, v)[..., None]
        S = S.unflatten(3, (heads, values)) * _exp(b[..., -1], v)[:, :, None, :, None]
        S = S.flatten(3)
    S = S + k.mT @ kept.transpose(2, 3).flatten(3)
    S = S.unflatten(3, (heads, values)).transpose(2, 3).flatten(1, 2)
    return o.flatten(1, 2), S.contiguous()


def _per_channel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """A decay per key channel: q, k, g (B, H, L, K), v (B, H, L, V)."""
    b = g.cumsum(2)
    M = _exp(_past((b[:, :, :, None] - b[:, :, None]).movedim(-1, -3)).movedim(-3, -1), v)
    scores = ((M * k[:, :, None]) @ q[..., None])[..., 0]
    o = scores @ v + (q * _exp(b, v)) @ S
    S = _exp(b[:, :, -1], v)[..., None] * S + (k * _exp(b[:, :, -1:] - b, v)).mT @ v
    return o, S


def _past(exponents: Tensor) -> Tensor:
    """(..., L, L) where the row's token comes after the column's or is the same; elsewhere GONE."""
    length = exponents.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=exponents.device).triu(1)
    return exponents.masked_fill(future, GONE)


def _exp(exponents: Tensor, like: Tensor) -> Tensor:
    """exp in the dtype of `like`, without denormal numbers, which CPUs are 100 times slower with."""
    exponents = exponents.to(like.dtype)
    least = -700.0 if like.dtype == torch.float64 else -80.0
    return exponents.masked_fill(exponents < least, -torch.inf).exp()
