"""Attention by matrix products, a block of queries at a time: knows everything, fuses nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_attention.kernels.softmax_attention.folding import folded, folds, unfolded
from altx_attention.kernels.softmax_attention.visibility import Place
from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast

SCORES = 2**20
"""Scores that exist at a time, of all heads and rows: few enough for the cache, enough for the matrix products."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, offset: Tensor | None = None,
    document: Tensor | None = None, slot_document: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference."""
    kept, dtype = v.dtype, precise(q, k, v, sinks)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    place = Place(causal, window, offset, document, slot_document)
    with no_autocast(q.device):
        if folds(q, k, place):
            q, k, v, place, sinks, shape = folded(q, k, v, place, sinks)
            return unfolded(_blocks(q, k, v, place, scale, softcap, sinks), shape).to(kept)
        return _blocks(q, k, v, place, scale, softcap, sinks).to(kept)


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, place: Place, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    batch, count, heads, _ = q.shape
    slots = k.shape[1]
    visible = place.visible(count, slots, q.device)
    block = max(1, SCORES // max(1, batch * heads * slots))
    if block >= count:
        return _block(q, k, v, visible, scale, softcap, sinks)
    # One for each query, or for each head.
    each = sinks is not None and sinks.dim() > 1
    ys = []
    for start in range(0, count, block):
        stop = min(start + block, count)
        # A causal block looks no further than its last query stands.
        end = slots - count + stop if place.causal and place.offset is None else slots
        seen = None if visible is None else visible[:, start:stop, :end]
        sink = sinks[:, start:stop] if sinks is not None and each else sinks
        ys.append(_block(q[:, start:stop], k[:, :end], v[:, :end], seen, scale, softcap, sink))
    return torch.cat(ys, 1)


def _block(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """All of it at once. The H / G heads of a key-value head are its queries, so that no key is copied."""
    _, count, heads, _ = q.shape
    groups, dtype = k.shape[2], q.dtype
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = (t.transpose(1, 2) for t in (k, v))
    score = ((q * scale) @ k.transpose(-1, -2)).unflatten(2, (heads // groups, count))  # (B, G, H / G, T, S)
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    if visible is not None:
        score = score.masked_fill(~visible[:, None, None], -torch.inf)
    if sinks is None:
        sink = score.new_full((1,), -torch.inf)
    else:
        sink = sinks.to(dtype).expand(len(q), count, heads).transpose(1, 2).unflatten(1, (groups, -1))[..., None]
    top = score.detach().amax(-1, keepdim=True) if score.shape[-1] else score.new_full((1,), -torch.inf)
    top = torch.maximum(top, sink.detach()).clamp(min=torch.finfo(dtype).min)
    weight = (score - top).exp()
    total = weight.sum(-1, keepdim=True) + (sink - top).exp()
    # What is divided is as wide as a value, not as a row of scores.
    y: Tensor = (weight.flatten(2, 3) @ v).unflatten(2, (heads // groups, count))
    y = y / total.masked_fill(total == 0, 1)
    return y.flatten(1, 2).transpose(1, 2)
