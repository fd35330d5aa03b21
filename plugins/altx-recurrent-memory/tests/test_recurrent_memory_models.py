"""Models with the memory: what they carry, what it costs, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from altx import recipe, registry
from altx.checkpoint import load, save
from altx.compose import compose
from altx.errors import AltxError
from altx.optim import optimizer_groups
from altx.resolve import resolve
from altx.testing import prove
from altx.testing.case import difference

SMALL = {"memory": [{"name": "recurrent-memory", "tokens": 2, "segment": 4}], "dim": 32, "layers": 2}


def test_blocks_of_several_kinds_run_in_segments() -> None:
    results = prove(compose({**SMALL, "mixer": "attention,mamba"}, seed=0))
    assert [(r.check, r.message) for r in results if r.status == "failed"] == []
    assert {r.check for r in results if r.status == "passed"} >= {
        "steps",
        "splits",
        "causality",
        "padding",
        "gradients",
    }


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_the_memory_alone_goes_from_segment_to_segment(mixer: str) -> None:
    """What came before a segment is heard in it, and with the memory's tokens cut off it is not."""
    model = compose({**SMALL, "mixer": mixer}, seed=0).double()
    tokens = torch.randint(0, 256, (1, 12))
    other = torch.cat([(tokens[:, :4] + 1) % 256, tokens[:, 4:]], 1)
    assert difference(model(other).y[:, 4:], model(tokens).y[:, 4:]) > 1e-6
    assert model.body.inner.memory.norm.weight.zero_().sum() == 0
    assert difference(model(other).y[:, 4:], model(tokens).y[:, 4:]) == 0


@torch.no_grad()
def test_a_token_costs_the_same_state_after_any_number_of_tokens() -> None:
    model = compose({**SMALL, "mixer": "attention"}, seed=0)
    state = model.init_state(1)
    size = state.bytes()
    for length in (3, 4, 9, 100):
        out = model(torch.randint(0, 256, (1, length)), state=state)
        assert out.state
        state = out.state
        assert state.bytes() == size
    assert state.tokens is not None and state.tokens.tolist() == [116]


@pytest.mark.parametrize("dim", [16, 32, 64, 768])
def test_the_defaults_work_at_every_width(dim: int) -> None:
    resolve(recipe.load({"mixer": "attention", "memory": "recurrent-memory", "dim": dim}), registry.default())


def test_memory_tokens_do_not_decay() -> None:
    model = compose({**SMALL, "mixer": "attention"}, seed=0)
    groups = optimizer_groups(model, lr=1e-3, weight_decay=0.1)
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(model.body.inner.memory.memory) in plain


def test_a_checkpoint_continues_where_it_was(tmp_path: Path) -> None:
    model = compose({**SMALL, "mixer": "attention"}, seed=0)
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    tokens = torch.randint(0, 256, (2, 11))
    assert again.config == model.config and torch.equal(again(tokens).y, model(tokens).y)
    assert "altx-recurrent-memory" in (tmp_path / "run" / "plugins.json").read_text()


@torch.no_grad()
def test_an_encoder_hands_its_memory_from_segment_to_segment() -> None:
    data = {**SMALL, "mixer": "attention", "causal": False, "head": {"kind": "vectors", "size": 3}}
    model, tokens = compose(data, seed=0).double(), torch.randint(0, 256, (1, 12))
    earlier, later = tokens.clone(), tokens.clone()
    earlier[:, 0], later[:, 8] = (earlier[:, 0] + 1) % 256, (later[:, 8] + 1) % 256
    y = model(tokens).y
    assert all(difference(model(earlier).y[:, t], y[:, t]) > 1e-9 for t in range(12))
    assert difference(model(later).y[:, :8], y[:, :8]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens: input should be greater than 0"),
        ({"segment": 0}, "segment: input should be greater than 0"),
        ({"write": "none"}, "write: input should be 'memory' or 'learned'"),
        ({"attach": "residual"}, "does not attach as 'residual'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    data = {"mixer": "attention", "dim": 32, **({"attach": change.pop("attach")} if "attach" in change else {})}
    with pytest.raises(AltxError) as caught:
        compose({**data, "memory": [{"name": "recurrent-memory", **change}]})
    assert message in str(caught.value)
