"""LSH attention of a few new tokens to all slots of a state, without sorting.

B rows, T new tokens, S slots, H heads, D head width, R rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_reformer.attend import HIDDEN, SELF
from altx_reformer.cache import Slots


def attend_few(
    q_BTHD: Tensor, bucket_BTHR: Tensor, index_BT: Tensor, document_BT: Tensor, slots: Slots, reach: int
) -> Tensor:
    """Attention of q to the last `reach` slots of its bucket and document in each round: (B, T, H, D).

    A slot that is seen in n rounds counts n times: its score is q . k + log n.
    """
    dtype = torch.promote_types(torch.promote_types(q_BTHD.dtype, slots.k.dtype), torch.float32)
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q_BTHD, slots.k, slots.v))
    slot = torch.arange(k.shape[2], device=q.device)
    past_BTS = (slot < index_BT[..., None]) & (slots.document[:, None] == document_BT[..., None])
    shared_BTSHR = (slots.bucket[:, None] == bucket_BTHR[:, :, None]) & past_BTS[..., None, None]
    # Sums along an axis that is not the last are twenty times as slow.
    shared = shared_BTSHR.permute(0, 1, 3, 4, 2).contiguous()
    nth = shared.cumsum(-1, dtype=torch.int32)
    count_BTHS = (shared & (nth > nth[..., -1:] - reach)).sum(3)
    bias_BTHS = count_BTHS.to(dtype).log_().clamp_(min=HIDDEN)
    bias_BTHS = bias_BTHS.masked_fill((slot == index_BT[..., None])[:, :, None], SELF)
    return F.scaled_dot_product_attention(q, k, v, bias_BTHS.transpose(1, 2), scale=1.0).transpose(1, 2)
