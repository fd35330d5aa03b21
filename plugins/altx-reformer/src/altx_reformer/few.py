"""LSH attention of a few new tokens to all slots of a state, without sorting.

B rows, T new tokens, S slots, H heads, D head width, R rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    # (B, H, R, T, S)
    mine, theirs = bucket_BTHR.permute(0, 2, 3, 1)[..., None], slots.bucket.permute(0, 2, 3, 1)[..., None, :]
    shared = (mine == theirs) & past_BTS[:, None, None]
    behind = shared.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    count_BHTS = (shared & (behind <= reach)).sum(2)
    scores = q @ k.transpose(-1, -2) + count_BHTS.to(dtype).log()
    scores = scores.masked_fill(count_BHTS == 0, HIDDEN)
    scores = scores.masked_fill((slot == index_BT[..., None])[:, None], SELF)
    return (scores.softmax(-1) @ v).transpose(1, 2)
