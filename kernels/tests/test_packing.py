"""Where the tokens of a batch lie in memory."""

from __future__ import annotations

import torch

from altx_kernels.packing import token_rows


def test_tokens_at_one_distance_are_read_where_they_lie():
    x, z = torch.randn(2, 5, 24).chunk(2, -1)
    heads = x.unflatten(2, (4, 3))
    for part in (x, z, x[:1, 2:], x[:, :1], heads, heads[:1, 1:], x[..., :1]):
        rows, stride = token_rows(part)
        assert rows is part and stride == (120 if part.shape[1] == 1 else 24)
    for part in (x.mT, x[:, 1:], x[..., ::2], heads.mT, heads[..., :2]):
        rows, stride = token_rows(part)
        assert torch.equal(rows, part) and rows.is_contiguous() and stride == part.shape[2:].numel()
