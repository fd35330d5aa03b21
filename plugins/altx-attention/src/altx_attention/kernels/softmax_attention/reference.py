"""Softmax attention as its papers write it.

B rows, T queries, S slots (keys), H query heads, G key-value heads, D width of a key, E width of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altx_attention.kernels.softmax_attention.visibility import Place
from altx_kernels.arguments import precise


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, offset: Tensor | None = None,
    document: Tensor | None = None, slot_document: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Vaswani et al. 2017, equation 1, head by head; see `altx_attention.kernels.softmax_attention.attention`."""
    count, slots, dtype = q.shape[1], k.shape[1], precise(q, k, v, sinks)
    group = q.shape[2] // k.shape[2]
    k, v_BSHE = (t.to(dtype).repeat_interleave(group, 2) for t in (k, v))
    score_BHTS = torch.einsum("bthd,bshd->bhts", q.to(dtype), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        score_BHTS = softcap * torch.tanh(score_BHTS / softcap)
    visible = Place(causal, window, offset, document, slot_document).visible(count, slots, q.device)
    if visible is not None:
        score_BHTS = score_BHTS.masked_fill(~visible[:, None], -torch.inf)
    # A slot that every query sees and that holds no value; without sinks its weight is 0.
    sink_BTH = score_BHTS.new_tensor(-torch.inf) if sinks is None else sinks.to(dtype)
    sink_BHT = sink_BTH.expand(len(q), count, q.shape[2]).transpose(1, 2)
    score_BHTS = torch.cat([score_BHTS, sink_BHT[..., None]], -1)
    top = score_BHTS.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weight_BHTS = (score_BHTS - top).exp()
    total = weight_BHTS.sum(-1, keepdim=True)
    # A query that sees nothing has a total of 0 and gets 0.
    weight_BHTS = weight_BHTS / total.masked_fill(total == 0, 1)
    return torch.einsum("bhts,bshe->bthe", weight_BHTS[..., :slots], v_BSHE).to(v.dtype)
