"""Linformer equals the package linformer with the same weights, and the paper's equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from altx_linformer.config import LinformerConfig
from altx_linformer.linformer import Linformer, build
from torch import Tensor

from altx.context import Context
from altx.spec import BuildContext

theirs = pytest.importorskip("linformer.linformer")
BOTH = Context(causal=False)


def make(dim: int = 16, **settings: object) -> Linformer:
    torch.manual_seed(0)
    layer = build(LinformerConfig(**settings), BuildContext(dim=dim)).double()
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=(3 * layer.k) ** -0.5 if name.startswith("proj") else 1.2 / dim**0.5)
    return layer


@pytest.mark.parametrize(
    ("dim", "length", "settings"),
    [
        (16, 20, {"max_len": 20, "k": 6, "heads": 4}),
        (16, 13, {"max_len": 20, "k": 6, "heads": 2, "head_dim": 5}),
        (32, 7, {"max_len": 50, "k": 30, "one_kv_head": True}),
        (32, 50, {"max_len": 50, "k": 30, "share_kv": True}),
        (64, 130, {"max_len": 200, "k": 16, "one_kv_head": True, "share_kv": True}),
        (64, 1, {"max_len": 9, "k": 3}),
    ],
)
def test_equals_the_package_linformer(dim: int, length: int, settings: dict) -> None:
    layer, config = make(dim, **settings), LinformerConfig(**settings)
    other = theirs.LinformerSelfAttention(
        dim, config.max_len, k=config.k, heads=config.heads, dim_head=config.head_dim,
        one_kv_head=config.one_kv_head, share_kv=config.share_kv,
    ).double()  # fmt: skip
    other.load_state_dict(layer.state_dict())  # the same names and shapes
    x = torch.randn(2, length, dim, dtype=torch.float64)
    ours, weights = layer(x, BOTH).y, torch.randn(2, length, dim, dtype=torch.float64)
    torch.testing.assert_close(ours, other(x), atol=1e-10, rtol=0)
    (ours * weights).sum().backward()
    (other(x) * weights).sum().backward()
    for name, parameter in other.named_parameters():
        mine = layer.get_parameter(name).grad
        torch.testing.assert_close(mine, parameter.grad, atol=1e-10 * float(parameter.grad.abs().max()), rtol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer.float()(x.float(), BOTH).y.double(), other(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def equations(layer: Linformer, row: Tensor) -> Tensor:
    """Equation 7 for one row (T, dim), head by head and query by query."""

    def of_head(weights: Tensor | None, h: int) -> Tensor:
        assert weights is not None
        return (weights if weights.dim() == 2 else weights[h])[: len(row)]

    width, outputs = layer.head_dim, []
    heads = layer.to_q.out_features // width
    for h in range(heads):
        kv = slice(h * width, (h + 1) * width) if layer.to_k.out_features > width else slice(0, width)
        Q = row @ layer.to_q.weight[h * width : (h + 1) * width].T
        K = row @ layer.to_k.weight[kv].T
        V = K if layer.to_v is None else row @ layer.to_v.weight[kv].T
        E = of_head(layer.proj_k, h)
        F = E if layer.proj_v is None else of_head(layer.proj_v, h)
        keys = [sum(E[t, i] * K[t] for t in range(len(row))) for i in range(layer.k)]
        values = [sum(F[t, i] * V[t] for t in range(len(row))) for i in range(layer.k)]
        mixed = []
        for q in Q:
            weights = [math.exp(float(q @ key) / math.sqrt(width)) for key in keys]
            mixed.append(sum(w / sum(weights) * value for w, value in zip(weights, values, strict=True)))
        outputs.append(torch.stack(mixed))
    return torch.cat(outputs, 1) @ layer.to_out.weight.T + layer.to_out.bias


SHARING = [
    {"heads": 2, "sharing": "none"},
    {"heads": 2, "sharing": "headwise"},
    {"heads": 2, "sharing": "key-value"},
    {"heads": 4, "one_kv_head": True, "head_dim": 3},
]


@pytest.mark.parametrize("k", [3, 12], ids=["fewer-than-tokens", "more-than-tokens"])
@pytest.mark.parametrize("settings", SHARING, ids=str)
@torch.no_grad()
def test_equals_the_equations_masked_and_with_resets(settings: dict, k: int) -> None:
    """The real tokens of each document are a sequence of their own, wherever padding lies and whatever it holds."""
    layer = make(max_len=15, k=k, **settings)
    x = torch.randn(4, 11, 16, dtype=torch.float64)
    for row, y in zip(x, layer(x, BOTH).y, strict=True):
        torch.testing.assert_close(y, equations(layer, row), atol=1e-11, rtol=0)
    mask, reset = torch.rand(4, 11) < 0.7, torch.rand(4, 11) < 0.3
    mask[3] = False
    x[~mask] = torch.nan
    masked = layer(x, BOTH.replace(mask=mask)).y
    parted = layer(x, BOTH.replace(mask=mask, reset=reset)).y
    assert masked.isfinite().all() and parted.isfinite().all()
    for b in range(3):
        row = x[b, mask[b]]
        torch.testing.assert_close(masked[b, mask[b]], equations(layer, row), atol=1e-11, rtol=0)
        starts = [0, *(i for i in reset[b, mask[b]].nonzero().flatten().tolist() if i), len(row)]
        pieces = [equations(layer, row[i:j]) for i, j in itertools.pairwise(starts)]
        torch.testing.assert_close(parted[b, mask[b]], torch.cat(pieces), atol=1e-11, rtol=0)
