"""Finding the best pairs: the right ones, without all their scores; and reading their values, and no others."""

from __future__ import annotations

import pytest
import torch
from altx_product_key.lookup import table, weighted_sum
from altx_product_key.search import best_pairs
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize(("heads", "tokens", "keys", "width", "k"), [(2, 5, 6, 3, 4), (1, 3, 9, 2, 9), (3, 4, 5, 4, 1)])
def test_the_best_pairs_of_all(heads: int, tokens: int, keys: int, width: int, k: int) -> None:
    torch.manual_seed(0)
    queries = torch.randn(2, heads, tokens, width, dtype=torch.float64)
    halves = torch.randn(2, heads, keys, width, dtype=torch.float64)
    scores, pairs = best_pairs(queries, halves, k)
    for h in range(heads):
        for m in range(tokens):
            every = {
                i * keys + j: float(queries[0, h, m] @ halves[0, h, i] + queries[1, h, m] @ halves[1, h, j])
                for i in range(keys)
                for j in range(keys)
            }
            wanted = sorted(every, key=every.__getitem__, reverse=True)[:k]
            assert pairs[h, m].tolist() == wanted
            assert scores[h, m].tolist() == pytest.approx([every[pair] for pair in wanted], abs=1e-12)


def test_equal_scores_give_k_different_pairs() -> None:
    _, pairs = best_pairs(torch.zeros(2, 1, 1, 3), torch.randn(2, 1, 8, 3), 8)
    assert len(set(pairs.flatten().tolist())) == 8


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_the_scores_of_all_pairs_are_never_there() -> None:
    queries, keys = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 256, 4)
    with Largest() as largest:
        best_pairs(queries, keys, 32)
    assert largest.numbers <= 2 * 2 * max(3 * 256, 4 * 256)


def test_only_chosen_rows_are_read_and_trained() -> None:
    torch.manual_seed(0)
    values = table(50, 6).double()
    chosen, weights = torch.tensor([[[3, 7], [7, 3]], [[7, 9], [1, 1]]]), torch.rand(2, 2, 2, dtype=torch.float64)
    read = [1, 3, 7, 9]
    left = [row for row in range(50) if row not in read]
    with torch.no_grad():
        values.weight[left] = float("nan")
    y = weighted_sum(values, chosen, weights)
    for token in range(2):
        wanted = sum(weights[h, token, n] * values.weight[chosen[h, token, n]] for h in range(2) for n in range(2))
        torch.testing.assert_close(y[token], wanted, rtol=0, atol=1e-14)
    y.sum().backward()
    assert values.weight.grad is not None
    assert values.weight.grad[left].eq(0).all() and values.weight.grad[read].ne(0).all()
