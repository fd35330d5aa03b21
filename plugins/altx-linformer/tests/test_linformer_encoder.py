"""Linformer in encoders, and refused elsewhere with a reason and a remedy."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from altx_linformer.config import LinformerConfig
from altx_linformer.linformer import build

from altx import checkpoint
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, CompositionError, ConfigError, UnsupportedContext
from altx.spec import BuildContext
from altx.testing import prove

CLASSIFIER = {"kind": "classifier", "classes": 4}
SMALL = {"name": "linformer", "max_len": 64, "k": 8}
ENCODER = {"dim": 32, "causal": False, "head": CLASSIFIER, "layers": 2}


@pytest.mark.parametrize("settings", [{}, {"router": "expert-choice", "feed_forward": "4*swiglu"}], ids=str)
def test_an_encoder_is_proved_trained_saved_and_loaded(settings: dict, tmp_path: Path) -> None:
    model = compose({**ENCODER, "mixer": [SMALL, "attention"], **settings}, seed=0)
    results = prove(model)
    assert [result for result in results if result.status == "failed"] == []
    assert next(r for r in results if r.check == "padding").status == "passed"
    text, labels = torch.randint(256, (8, 20)), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(text).y, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    checkpoint.save(model, tmp_path / "run")
    assert torch.equal(checkpoint.load(tmp_path / "run")(text).y, model(text).y)


def test_a_causal_model_refuses_it() -> None:
    with pytest.raises(CompositionError) as caught:
        compose({"dim": 32, "mixer": "linformer"})
    assert "lets a token see later ones, so it cannot enter a causal model" in str(caught.value)
    assert "causal: false" in str(caught.value.hint)


def test_a_causal_context_and_a_state_are_refused() -> None:
    layer = build(LinformerConfig(max_len=8), BuildContext(dim=16))
    with pytest.raises(UnsupportedContext, match="a token sees later ones"):
        layer(torch.randn(1, 4, 16))
    assert layer.init_state(1) is None


@pytest.mark.parametrize("packed", [False, True])
def test_more_tokens_than_places_are_refused(packed: bool) -> None:
    model = compose({"dim": 32, "causal": False, "head": {"kind": "vectors", "size": 2}, "mixer": [SMALL], "layers": 1})
    ctx = Context(cu_seqlens=torch.tensor([0, 65])) if packed else Context()
    with pytest.raises(UnsupportedContext, match="65 tokens are more than the 64"):
        model(torch.randint(256, (1, 65)), ctx)
    layer = build(LinformerConfig(max_len=8), BuildContext(dim=16))
    with pytest.raises(UnsupportedContext, match="9 tokens are more than the 8") as caught:
        layer(torch.randn(1, 9, 16), Context(causal=False))
    assert "set linformer.max_len to 9" in str(caught.value.hint)


@torch.no_grad()
def test_packed_sequences_may_be_longer_together() -> None:
    model = compose({"dim": 32, "causal": False, "head": {"kind": "vectors", "size": 2}, "mixer": [SMALL], "layers": 1})
    text, cu = torch.randint(256, (1, 150)), torch.tensor([0, 64, 70, 130, 150])
    packed = model.double()(text, Context(cu_seqlens=cu)).y
    alone = [model(text[:, i:j]).y for i, j in itertools.pairwise(cu)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("dim", "settings", "message"),
    [
        (36, {}, "dim 36 is not divisible by heads 8; use heads 6 or 9, or dim 40, or set head_dim"),
        (32, {"sharing": "none", "share_kv": True}, "sharing none gives each head E and F of its own, and share_kv"),
        (32, {"sharing": "layerwise"}, "'none', 'headwise' or 'key-value'"),
        (32, {"max_len": 0}, "greater than 0"),
        (32, {"seq_len": 64}, "unknown key"),
    ],
)
def test_a_bad_setting_is_refused_with_a_remedy(dim: int, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose({**ENCODER, "dim": dim, "mixer": [{"name": "linformer", **settings}]})
    assert message in str(caught.value)


def test_a_memory_that_only_looks_backwards_is_refused() -> None:
    """An encoder would run mixer and memory together in each direction, and linformer has none."""
    with pytest.raises(AltxError, match="linformer") as caught:
        compose({**ENCODER, "mixer": [SMALL], "memory": "ntm"})
    assert "sublayer of its own" in str(caught.value.hint)


def test_mixtures_of_few_tokens_may_be_more_than_the_tokens() -> None:
    layer = build(LinformerConfig(max_len=512), BuildContext(dim=16))
    for length in (0, 1, 2, 300):
        assert layer(torch.randn(1, length, 16), Context(causal=False)).y.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 300, 16), Context(causal=False)).y.dtype == torch.bfloat16
