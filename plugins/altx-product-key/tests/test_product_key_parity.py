"""`product-key` against the package product-key-memory and the paper's equations; `memory-layer` against its authors'.

memory_layer_upstream_values.safetensors was made by facebookresearch/memory at commit
7f85280cee4a4696f5e0444d5657dc09282408ff, `lingua/product_key/memory.py` (HashingMemory), on a CPU: two layers that
share their values, torch.manual_seed(7), `reset_parameters()`, everything in float64, inputs normal. Its kernel for
values, which needs a GPU, was replaced by torch's embedding_bag, beside which the authors test it, and
`scores.float()` before the softmax by `scores`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from altx_product_key.config import MemoryLayerConfig, ProductKeyConfig
from altx_product_key.memory_layer import MemoryLayer
from altx_product_key.product_key import ProductKey
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

SIZES = [
    (12, {"heads": 2, "keys": 8, "topk": 4, "key_dim": 6}),
    (16, {"heads": 4, "keys": 16, "topk": 16, "key_dim": 8, "weights": "relu"}),
    (48, {"heads": 3, "keys": 40, "topk": 32, "key_dim": 128}),
    (8, {"heads": 1, "keys": 5, "topk": 1, "key_dim": 3}),
]


def package(dim: int, settings: dict) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("product_key_memory")
    return library.PKM(
        dim,
        heads=settings["heads"],
        num_keys=settings["keys"],
        topk=settings["topk"],
        dim_head=settings["key_dim"],
        non_competitive_gates=settings.get("weights") == "relu",
    )


@pytest.mark.parametrize(("dim", "settings"), SIZES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_product_key_and_the_package_agree(dim: int, settings: dict, dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    theirs, ours = package(dim, settings).to(dtype), ProductKey(ProductKeyConfig(**settings), dim).to(dtype)
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 1.5)
        theirs.norm.bias.uniform_(-0.5, 0.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, dim, dtype=dtype)
    found, wanted = ours.scan(x, ours.init_state(2)).read.value, theirs(x)
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=0, atol=within)
    weights = torch.randn_like(wanted)
    for y in (found, wanted):
        (y * weights).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=10 * within, msg=name)


def softmax_of_best(scores: list[float], k: int) -> dict[int, float]:
    """Section 3.1, equations (1) and (2)."""
    best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:k]
    weights = torch.tensor([scores[i] for i in best], dtype=torch.float64).exp()
    return dict(zip(best, (weights / weights.sum()).tolist(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("dim", "settings"), [SIZES[0], SIZES[3]])
def test_product_key_is_the_papers(dim: int, settings: dict) -> None:
    torch.manual_seed(0)
    memory = ProductKey(ProductKeyConfig(**settings), dim).double()
    heads, keys, k = settings["heads"], settings["keys"], settings["topk"]
    x = torch.randn(1, 3, dim, dtype=torch.float64)
    for token, y in zip(x[0], memory.look_up(x)[0], strict=True):
        halves = F.layer_norm((memory.to_queries.weight @ token).view(2, heads, -1), (settings["key_dim"],), eps=1e-5)
        wanted = torch.zeros(dim, dtype=torch.float64)
        for h in range(heads):
            scores = [
                float(halves[0, h] @ memory.keys[h, i, 0] + halves[1, h] @ memory.keys[h, j, 1])
                for i in range(keys)
                for j in range(keys)
            ]
            for row, weight in softmax_of_best(scores, k).items():
                wanted += weight * memory.values.weight[row]
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)


CASES = {
    "gated": {"keys": 10, "heads": 2, "topk": 4, "key_dim": 4},
    "linear": {"keys": 9, "heads": 3, "topk": 9, "key_dim": 3, "value_dim": 6, "projection": "linear"},
    "narrow": {"keys": 7, "heads": 2, "topk": 3, "key_dim": 2, "value_dim": 6, "output_gate": True},
    "none": {"keys": 6, "heads": 2, "topk": 1, "key_dim": 3, "projection": "none", "output_gate": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_memory_layer_and_its_authors_agree(case: str, dtype: torch.dtype, within: float) -> None:
    stored = load_file(Path(__file__).with_name("memory_layer_upstream_values.safetensors"))
    stored = {name.removeprefix(f"{case}/"): t.to(dtype) for name, t in stored.items() if name.startswith(f"{case}/")}

    def weights(layer: int) -> dict[str, Tensor]:
        named = {name.removeprefix(f"{layer}/"): t for name, t in stored.items() if name.startswith(f"{layer}/")}
        return {name: t for name, t in named.items() if name != "y"}

    x, config = stored["x"], MemoryLayerConfig(**CASES[case])
    first = MemoryLayer(config, x.shape[-1]).to(dtype)
    second = MemoryLayer(config, x.shape[-1], first.table).to(dtype)
    for index, layer in enumerate((first, second)):
        layer.load_state_dict(weights(index))
        torch.testing.assert_close(layer.look_up(x), stored[f"{index}/y"], rtol=0, atol=within)
