"""Layouts: padded, compact and packed hold the same tokens."""

from __future__ import annotations

import torch

from altx.context import Context
from altx.layout import append, compaction, repack, reverse, take, unpack
from altx.masking import by_document


def test_compaction_keeps_order_and_comes_back() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
    x = torch.arange(20.0).reshape(2, 5, 2)
    order, back = compaction(mask)
    compact = take(x, order)
    assert torch.equal(compact[0, :3], x[0, [1, 3, 4]])
    assert torch.equal(compact[1, :2], x[1, [0, 4]])
    assert torch.equal(take(compact, back), x)


def test_unpack_and_repack_are_inverses_with_empty_sequences() -> None:
    x = torch.arange(7.0).reshape(1, 7, 1)
    padded, mask = unpack(x, torch.tensor([0, 3, 3, 7]))
    assert mask.sum(1).tolist() == [3, 0, 4]
    assert padded[2, :, 0].tolist() == [3, 4, 5, 6]
    assert torch.equal(repack(padded, mask), x)


def test_reverse_mirrors_real_tokens_only() -> None:
    x = torch.tensor([[9.0, 1, 9, 2, 3]])[..., None]
    mask = torch.tensor([[0, 1, 0, 1, 1]], dtype=torch.bool)
    assert reverse(x, mask)[0, :, 0].tolist() == [9, 3, 9, 2, 1]
    assert torch.equal(reverse(reverse(x, mask), mask), x)
    assert torch.equal(reverse(x, None), x.flip(1))


def test_append_writes_real_tokens_after_each_rows_own_length() -> None:
    buffer = torch.zeros(2, 2, 1)
    new = torch.tensor([[1.0, 2, 3], [4, 5, 6]])[..., None]
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    out = append(buffer, new, torch.tensor([1, 0]), mask)
    assert out[..., 0].tolist() == [[0, 2, 3], [4, 0, 0]]
    assert torch.equal(buffer, torch.zeros(2, 2, 1)), "the old buffer is untouched"
    unmasked = append(buffer, new[:, :2], torch.tensor([0, 1]), None)
    assert unmasked[..., 0].tolist() == [[1, 2, 0], [0, 4, 5]]


def test_append_in_place_reuses_the_buffer() -> None:
    for mask in (None, torch.tensor([[True]])):
        buffer = torch.zeros(1, 3, 1)
        out = append(buffer, torch.ones(1, 1, 1), torch.tensor([2]), mask, in_place=True)
        assert out.data_ptr() == buffer.data_ptr()
        assert buffer[0, :, 0].tolist() == [0, 0, 1]


def test_documents_become_rows_and_come_back() -> None:
    x = torch.arange(1, 13).reshape(2, 6)
    reset = torch.tensor([[0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1]]).bool()
    documents = by_document(x, Context(mask=mask, reset=reset))
    rows = [row[real].tolist() for row, real in zip(documents.x, documents.mask, strict=True)]
    assert rows == [[1, 2], [3, 5], [6], [7, 8, 10, 11, 12]]  # a reset at a masked token means nothing
    assert torch.equal(documents.restore(documents.x), x)
    assert by_document(x[:0], Context(reset=reset[:0])).x.shape[0] == 0
