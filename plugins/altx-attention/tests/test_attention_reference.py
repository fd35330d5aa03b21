"""Attention equals the papers' equations, written out head by head and query by query."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from altx_attention.attention import Attention, build
from altx_attention.config import AttentionConfig
from torch import Tensor

from altx.context import Context
from altx.spec import BuildContext

DIM, LENGTH = 16, 9


def make(**settings: object) -> Attention:
    torch.manual_seed(0)
    layer = build(AttentionConfig(**settings), BuildContext(dim=DIM)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return layer


def turned(x: Tensor, position: float, theta: float) -> Tensor:
    """x (D,) as D/2 complex numbers, feature i with feature i + D/2, times exp(i position theta^(-2i/D))."""
    half = len(x) // 2
    speeds = torch.tensor([theta ** (-2 * i / len(x)) for i in range(half)], dtype=torch.float64)
    z = torch.complex(x[:half], x[half:]) * torch.exp(1j * position * speeds)
    return torch.cat([z.real, z.imag])


def normed(x: Tensor, norm: torch.nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def naive(
    layer: Attention, config: AttentionConfig, row: Tensor, positions: list[float], sees: list[list[int]]
) -> Tensor:
    """Attention over one row (T, D) in which query t looks at the tokens `sees[t]`."""

    def project(name: str, heads: int) -> Tensor:
        linear = getattr(layer, name)
        bias = 0 if linear.bias is None else linear.bias
        return (row @ linear.weight.T + bias).reshape(len(row), heads, -1)

    kv_heads = config.kv_heads or config.heads
    q, k, v = project("q_proj", config.heads), project("k_proj", kv_heads), project("v_proj", kv_heads)
    gate = torch.ones(len(row), q[0].numel(), dtype=torch.float64)
    if config.gate:
        q, gate = q[..., : layer.head_dim], torch.sigmoid(q[..., layer.head_dim :]).flatten(1)
    if config.qk_norm == "head":
        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    elif config.qk_norm == "width":
        q = normed(q.flatten(1), layer.q_norm).unflatten(1, q.shape[1:])
        k = normed(k.flatten(1), layer.k_norm).unflatten(1, k.shape[1:])
    turns = round(config.rotary_fraction * layer.head_dim)
    scale = config.scale or layer.head_dim**-0.5
    rows = []
    for t, visible in enumerate(sees):
        mixed = []
        for head in range(config.heads):
            group = head // (config.heads // kv_heads)
            query, keys = q[t, head], [k[j, group] for j in visible]
            if config.rotary:
                query, *keys = (
                    torch.cat([turned(x[:turns], at, config.rope_theta), x[turns:]])
                    for x, at in zip([query, *keys], [positions[t], *(positions[j] for j in visible)], strict=True)
                )
            scores = [float(query @ key) * scale for key in keys]
            if config.softcap:
                scores = [config.softcap * math.tanh(score / config.softcap) for score in scores]
            weights = [math.exp(score) for score in scores]
            total = sum(weights) + (math.exp(float(layer.sinks[head])) if config.sinks else 0)
            mixed.append(sum(w / total * v[j, group] for w, j in zip(weights, visible, strict=True)))
        rows.append(torch.cat(mixed) * gate[t])
    bias = 0 if layer.o_proj.bias is None else layer.o_proj.bias
    return torch.stack(rows) @ layer.o_proj.weight.T + bias


def seen_by(config: AttentionConfig, causal: bool, length: int, starts: tuple[int, ...] = (0,)) -> list[list[int]]:
    """Which tokens each one may look at; `starts` are the first tokens of the documents."""

    def sees(i: int, j: int) -> bool:
        same = sum(s <= i for s in starts) == sum(s <= j for s in starts)
        return same and (j <= i or not causal) and (config.window is None or abs(i - j) < config.window)

    return [[j for j in range(length) if sees(i, j)] for i in range(length)]


SETTINGS = [
    {},
    {"heads": 8, "kv_heads": 2, "bias": True},
    {"kv_heads": 1, "head_dim": 6, "rope_theta": 100.0},
    {"rotary": False, "bias": True},
    {"window": 3, "kv_heads": 2},
    {"window": 1},
    {"window": 50, "heads": 2},
    {"head_dim": 8, "rotary_fraction": 0.25, "scale": 0.9, "softcap": 1.5, "kv_heads": 2, "gate": True},
    {"sinks": True, "window": 4, "bias": True, "qk_norm": "head"},
    {"sinks": True, "rotary": False, "softcap": 2.0, "qk_norm": "width", "gate": True, "bias": True, "kv_heads": 2},
]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_equals_the_equations(settings: dict, causal: bool) -> None:
    config, layer = AttentionConfig(**settings), make(**settings)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    sees = seen_by(config, causal, LENGTH)
    expected = torch.stack([naive(layer, config, row, list(range(LENGTH)), sees) for row in x])
    torch.testing.assert_close(layer(x, Context(causal=causal)).y, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_a_masked_batch_with_resets_equals_the_equations_on_its_real_tokens(settings: dict, causal: bool) -> None:
    config, layer = AttentionConfig(**settings), make(**settings)
    x = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    mask, reset = torch.rand(3, LENGTH) < 0.7, torch.rand(3, LENGTH) < 0.4
    mask[2] = False
    y = layer(x, Context(causal=causal, mask=mask, reset=reset)).y
    assert y.isfinite().all()
    for b in range(2):
        row, starts = x[b, mask[b]], tuple(reset[b, mask[b]].nonzero().flatten().tolist())
        sees = seen_by(config, causal, len(row), starts)
        expected = naive(layer, config, row, list(range(len(row))), sees)
        torch.testing.assert_close(y[b, mask[b]], expected, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_given_positions_turn_queries_and_keys_but_hide_nothing() -> None:
    config, layer = AttentionConfig(window=4), make(window=4)
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    positions = torch.randint(0, 50, (1, LENGTH))
    expected = naive(layer, config, x[0], positions[0].tolist(), seen_by(config, True, LENGTH))
    whole = layer(x, Context(positions=positions)).y
    torch.testing.assert_close(whole[0], expected, atol=1e-12, rtol=1e-10)
    state, pieces = layer.init_state(1), []
    for start, stop in itertools.pairwise([0, 2, 3, LENGTH]):
        out = layer(x[:, start:stop], Context(positions=positions).slice(start, stop), state)
        state, pieces = out.state, [*pieces, out.y]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_positions_go_with_their_tokens_where_others_are_masked(window: int | None) -> None:
    config, layer = AttentionConfig(window=window), make(window=window)
    x, mask = torch.randn(2, LENGTH, DIM, dtype=torch.float64), torch.rand(2, LENGTH) < 0.6
    positions = torch.randint(0, 50, (2, LENGTH))
    ctx = Context(positions=positions, mask=mask)
    state, pieces = layer.init_state(2), []
    for start, stop in itertools.pairwise([0, 4, 5, LENGTH]):
        out = layer(x[:, start:stop], ctx.slice(start, stop), state)
        state, pieces = out.state, [*pieces, out.y]
    for y in (layer(x, ctx).y, torch.cat(pieces, 1)):
        for b in range(2):
            real = mask[b]
            sees = seen_by(config, True, int(real.sum()))
            expected = naive(layer, config, x[b, real], positions[b, real].tolist(), sees)
            torch.testing.assert_close(y[b, real], expected, atol=1e-12, rtol=1e-10)
