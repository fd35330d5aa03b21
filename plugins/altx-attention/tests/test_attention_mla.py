"""Latent attention: the equations, the two ways to compute them, what the state holds, what is refused."""

from __future__ import annotations

import cmath
import itertools
from typing import Any

import pytest
import torch
from altx_attention.mla import LatentAttention, build
from altx_attention.mla_config import LatentAttentionConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from altx.compose import compose
from altx.context import Context
from altx.errors import ConfigError, UnsupportedContext
from altx.spec import BuildContext
from altx.testing.case import difference

DIM, LENGTH = 16, 12
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "compressed queries": {"q_lora_rank": 5, "heads": 2, "bias": True, "rope_interleave": False},
    "wide latents": {"kv_lora_rank": 40, "v_head_dim": 3, "qk_nope_head_dim": 6, "scale": 0.3},
    "no positions": {"rotary": False, "qk_rope_head_dim": 3},
}


def make(**settings: Any) -> LatentAttention:
    torch.manual_seed(0)
    layer = build(LatentAttentionConfig(**settings), BuildContext(dim=DIM)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return layer


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def layer(request: pytest.FixtureRequest) -> LatentAttention:
    return make(**request.param)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int, interleave: bool) -> list[complex]:
    """x (P,) as complex numbers, turned."""
    half = len(x) // 2
    pairs = [(x[2 * i], x[2 * i + 1]) if interleave else (x[i], x[i + half]) for i in range(half)]
    angles = [position * 10000.0 ** (-2 * i / len(x)) for i in range(half)]
    return [complex(a, b) * cmath.exp(1j * angle) for (a, b), angle in zip(pairs, angles, strict=True)]


def by_hand(layer: LatentAttention, x: Tensor) -> Tensor:
    """DeepSeek-V2's equations 9 to 19, head by head and token by token, for a row (T, D)."""
    outputs = []
    up_k, up_v = layer.kv_b_proj.weight.unflatten(0, (layer.heads, -1)).split([layer.nope, layer.value], 1)
    compressed = [layer.kv_a_proj_with_mqa(token) for token in x]
    c = [normed(z[: layer.rank], layer.kv_a_layernorm.weight) for z in compressed]
    for t, token in enumerate(x):
        if layer.compresses_queries:
            q = layer.q_b_proj(normed(layer.q_a_proj(token), layer.q_a_layernorm.weight))
        else:
            q = layer.q_proj(token)
        heads = []
        for h, query in enumerate(q.reshape(layer.heads, -1)):
            scores = []
            for s in range(t + 1):
                score = float(query[: layer.nope] @ (up_k[h] @ c[s]))
                q_rope, k_rope = query[layer.nope :], compressed[s][layer.rank :]
                if layer.rotary:
                    pairs = zip(turned(q_rope, t, layer.interleave), turned(k_rope, s, layer.interleave), strict=True)
                    score += sum((a * b.conjugate()).real for a, b in pairs)
                else:
                    score += float(q_rope @ k_rope)
                scores.append(score * layer.scale)
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            heads.append(sum(w * (up_v[h] @ c[s]) for s, w in enumerate(weights)))
        outputs.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(outputs)


@torch.no_grad()
def test_equals_the_equations(layer: LatentAttention) -> None:
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    assert difference(layer(x).y[0], by_hand(layer, x[0])) < 1e-12


@pytest.mark.parametrize("few", [True, False], ids=["absorbed", "expanded"])
@torch.no_grad()
def test_both_ways_to_compute_it_agree(layer: LatentAttention, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask, reset = (
        torch.randn(3, LENGTH, DIM, dtype=torch.float64),
        torch.rand(3, LENGTH) < 0.7,
        torch.rand(3, 12) < 0.3,
    )
    contexts = [Context(), Context(mask=mask, reset=reset), Context(causal=False, mask=mask), Context(causal=False)]
    wanted = [layer(x, ctx).y for ctx in contexts]
    monkeypatch.setattr(LatentAttention, "_few", lambda self, count: few)
    for ctx, expected in zip(contexts, wanted, strict=True):
        real = mask if ctx.mask is not None else torch.ones_like(mask)
        assert difference(layer(x, ctx).y[real], expected[real]) < 1e-12
        state, pieces = layer.init_state(3, capacity=20), []
        if ctx.causal:
            for start, stop in itertools.pairwise([0, 5, 6, 7, 12]):
                out = layer(x[:, start:stop], ctx.slice(start, stop), state)
                state, pieces = out.state, [*pieces, out.y]
            assert difference(torch.cat(pieces, 1)[real], expected[real]) < 1e-12


def test_the_cheaper_way_is_taken() -> None:
    """DeepSeek-V3's widths: a latent of 512 serves up to some 170 queries, and no longer prompt."""
    wide = build(LatentAttentionConfig(heads=2, kv_lora_rank=512), BuildContext(dim=256))
    assert wide._few(1) and wide._few(170) and not wide._few(171)


@torch.no_grad()
def test_a_step_makes_nothing_per_head_and_slot() -> None:
    slots, heads = 300, 8
    layer = make(heads=heads, kv_lora_rank=12, qk_nope_head_dim=6, v_head_dim=6, qk_rope_head_dim=4)
    ctx = Context(donate_state=True)
    state = layer(torch.randn(1, slots, DIM).double(), ctx, layer.init_state(1, capacity=slots + 9)).state
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, Tensor))
            return out

    with Watch():
        layer(torch.randn(1, 1, DIM).double(), ctx, state)
    # The latents themselves are the largest; keys or values of all heads would be 3 times as large.
    assert max(sizes) <= (slots + 9) * 16 < slots * heads * 6


def test_the_state_is_a_latent_and_one_key_per_token() -> None:
    layer = make(kv_lora_rank=7, qk_rope_head_dim=4)
    state = layer(torch.randn(2, 5, DIM).double(), state=layer.init_state(2)).state
    assert state["latent"].shape == (2, 5, 11)
    assert set(state.leaves) == {"latent", "document"}


def test_published_widths_are_the_defaults_where_they_fit() -> None:
    v2_lite, small = LatentAttentionConfig(heads=16), LatentAttentionConfig()
    assert [f(2048) for f in (v2_lite.nope, v2_lite.rope, v2_lite.value, v2_lite.rank)] == [128, 64, 128, 512]
    assert [f(16) for f in (small.nope, small.rope, small.value, small.rank)] == [4, 2, 4, 4]


def test_weights_start_as_in_deepseek_v3() -> None:
    torch.manual_seed(0)
    layer = build(LatentAttentionConfig(heads=8, q_lora_rank=64, bias=True), BuildContext(dim=256))
    for name, parameter in layer.named_parameters():
        if "layernorm" in name:
            assert (parameter == 1).all()
        else:
            std = 0.0 if name.endswith("bias") else 0.006
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"qk_rope_head_dim": 5},
            "rotary needs an even qk_rope_head_dim, not 5; use qk_rope_head_dim 6, or rotary false",
        ),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"window": 4}, "window"),
    ],
)
def test_a_bad_setting_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose({"dim": 64, "mixer": [{"name": "mla", **settings}], "layers": 1})
    assert message in str(caught.value)


def test_looking_both_ways_cannot_continue_a_state(layer: LatentAttention) -> None:
    with pytest.raises(UnsupportedContext, match="cannot continue a state"):
        layer(torch.zeros(3, 4, DIM).double(), Context(causal=False), layer.init_state(3))
