"""Attention by `torch.nn.functional.scaled_dot_product_attention`, which picks among torch's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altx_attention.kernels.softmax_attention.folding import folded, folds, unfolded
from altx_attention.kernels.softmax_attention.visibility import Place
from altx_kernels.autocast import no_autocast

FEW = 16
"""Queries for which an argument is not worth copying."""


def unavailable(
    q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None = None, sinks: Tensor | None = None, **place: Any
) -> str | None:
    """Why it cannot run a call, or None."""
    if softcap is not None:
        return "torch's fused kernels know no soft cap"
    if sinks is not None and q.shape[1] < FEW:
        return f"sinks take a copy of the keys, for {q.shape[1]} queries"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, offset: Tensor | None = None,
    document: Tensor | None = None, slot_document: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference, but that there is no soft cap."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    place = Place(causal, window, offset, document, slot_document)
    with no_autocast(q.device):
        if folds(q, k, place):
            q, k, v, place, sinks, shape = folded(q, k, v, place, sinks)
            return unfolded(_attention(q, k, v, place, scale, sinks), shape)
        return _attention(q, k, v, place, scale, sinks)


def _attention(q: Tensor, k: Tensor, v: Tensor, place: Place, scale: float, sinks: Tensor | None) -> Tensor:
    count, slots, wide = q.shape[1], k.shape[1], v.shape[-1]
    if not q.numel() or not k.numel():
        return v.new_zeros(*q.shape[:3], wide) + (q.sum() + k.sum() + v.sum()) * 0
    anywhere = (place.window is None or place.window >= slots) and place.offset is None and place.document is None
    triangle = anywhere and place.causal and count == slots and count > 1
    # One query at the last slot sees everything.
    everything = anywhere and (not place.causal or count == 1)
    visible = None if triangle or everything else place.visible(count, slots, q.device)
    if sinks is not None:
        q, k, v = with_sinks(q, k, v, sinks, scale, triangle)
        if visible is not None:
            visible = F.pad(visible, (1, 0), value=True)
    # The fused kernels take keys and values of one width only.
    if wide < k.shape[-1]:
        v = F.pad(v, (0, k.shape[-1] - wide))
    elif wide > k.shape[-1]:
        q, k = (F.pad(t, (0, wide - t.shape[-1])) for t in (q, k))
    if visible is None and (count > 1 or q.shape[2] == k.shape[2]):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=triangle, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
    else:
        y = _masked(q, k, v, visible, scale)
    return y[:, -count:, :, :wide]


def with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, triangle: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments whose first slot is the sinks, seen by all and holding the value 0.

    A query's score there is its sink: two more features hold sink / scale and what rounding took off it, and 1 in the
    first slot's key, 0 in all others. Rows are widened by 8 features, since kernels on GPUs want a multiple. Where
    slots are seen by a triangle, a query that nobody asked for goes first, and sees the first slot alone.
    """
    wanted = (sinks / scale).expand(q.shape[:-1])
    feature = wanted.to(q.dtype)
    rest = (wanted - feature.to(wanted.dtype)).to(q.dtype)
    q = F.pad(torch.cat([q, torch.stack([feature, rest], -1)], -1), (0, 6, 0, 0, int(triangle), 0))
    first = F.pad(k.new_ones(k.shape[0], 1, k.shape[2], 2), (k.shape[-1], 6))
    k = torch.cat([first, F.pad(k, (0, 8))], 1)
    return q, k, F.pad(v, (0, 0, 0, 0, 1, 0))


def _masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """The H / G query heads of a key-value head are laid end to end as its queries, so that no kernel copies keys."""
    count, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    nothing = None
    if visible is not None:
        # Some kernels give NaN where softmax has nothing to sum: such a query looks at everything, and gets 0.
        nothing = ~visible.any(-1, keepdim=True)
        visible = (visible | nothing).repeat(1, heads // groups, 1)[:, None]
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), visible, scale=scale)
    y = y.reshape(len(y), groups, heads // groups, count, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return y if nothing is None else y.masked_fill(nothing[..., None], 0)
