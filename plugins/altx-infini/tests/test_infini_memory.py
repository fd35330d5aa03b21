"""It is the paper's, and what infini-transformer-pytorch computes; models with it; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from altx_infini.config import InfiniConfig
from altx_infini.memory import Infini
from safetensors.torch import load_file
from torch import Tensor

from altx import recipe, registry
from altx.checkpoint import load, save
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError
from altx.memory import split_heads
from altx.optim import optimizer_groups
from altx.resolve import resolve
from altx.spec import Heads
from altx.testing.case import agitate, difference, state_difference
from altx.testing.partners import LocalAttention

UPSTREAM = load_file(Path(__file__).with_name("infini_upstream_values.safetensors"))
"""CausalAttention of the package infini-transformer-pytorch 0.2.1 in float64, seed 0: width 8, 2 heads of 4, over 17
tokens in segments of 5, without and with use_mem_delta_rule, its norm left out. Channels of q and k in our order for
rotary angles; "gate" is the negative of its head_gates, whose sigmoid is the share of what is local."""


def features(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def paper(q: Tensor, k: Tensor, v: Tensor, segment: int, update: str) -> Tensor:
    """Equations 3 to 5 for one head, query by query and segment by segment: A_mem (T, V), 0 in the first segment."""
    M, z = torch.zeros(k.shape[-1], v.shape[-1]).double(), torch.zeros(k.shape[-1]).double()
    out = []
    for start in range(0, len(q), segment):
        stop = start + segment
        for t in range(start, min(stop, len(q))):
            out.append(features(q[t]) @ M / (features(q[t]) @ z) if start else torch.zeros(v.shape[-1]).double())
        if stop <= len(q):
            new = M.clone()
            for t in range(start, stop):
                old = features(k[t]) @ M / (features(k[t]) @ z) if start and update == "delta" else 0
                new = new + torch.outer(features(k[t]), v[t] - old)
                z = z + features(k[t]) if update == "linear" else z
            if update == "delta":
                z = z + sum(features(k[t]) for t in range(start, stop))
            M = new
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_it_is_the_papers_equations(update: str) -> None:
    heads = Heads(query=4, kv=2, key_dim=3, value_dim=5)
    memory = agitate(Infini(InfiniConfig(segment=4, update=update), 16, heads).double())
    x = torch.randn(2, 14, heads.width, dtype=torch.float64)
    found = memory.scan(x, memory.init_state(2)).read.attended
    assert found is not None and found.share is not None
    q, k, v = split_heads(x, heads)
    for row in range(2):
        for h in range(4):
            wanted = paper(q[row, :, h] * 3**0.5, k[row, :, h // 2], v[row, :, h // 2], 4, update)
            assert difference(found.value[row, :, h], wanted) < 1e-12
            assert (found.share[row, :4, h] == 0).all()
            assert difference(found.share[row, 4:, h], torch.sigmoid(memory.gate[h]).expand(10)) < 1e-15


@torch.no_grad()
def test_with_projections_of_its_own_it_is_the_same() -> None:
    memory = agitate(Infini(InfiniConfig(segment=4, heads=2), 6).double())
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    q, k, v = split_heads(memory.qkv_proj(x), memory.heads)
    parts = [torch.sigmoid(memory.gate[h]) * paper(q[0, :, h], k[0, :, h], v[0, :, h], 4, "linear") for h in range(2)]
    wanted = memory.o_proj(torch.cat(parts, -1))
    assert difference(memory.scan(x, memory.init_state(1)).read.value[0], wanted) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_it_is_the_package_infini_transformer_pytorch(update: str) -> None:
    model = compose(
        {
            "dim": 8,
            "mixer": [{"name": "attention", "heads": 2}],
            "memory": [{"name": "infini", "segment": 5, "update": update}],
            "attach": "kv",
            "layers": 1,
        }
    ).double()
    layer = next(module for module in model.modules() if type(module).__name__ == "KVAttach")
    weights = {f"mixer.{n}": w for n, w in UPSTREAM.items() if n.endswith("weight")}
    layer.load_state_dict({**weights, "memory.gate": UPSTREAM["gate"]})
    layer.mixer = LocalAttention(layer.mixer, 5)
    assert difference(layer(UPSTREAM["x"]).y, UPSTREAM[update]) < 1e-8
    assert difference(UPSTREAM["linear"], UPSTREAM["delta"]) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("attach", ["residual", "kv"])
def test_it_carries_what_a_window_no_longer_sees(attach: str) -> None:
    data = {"mixer": [{"name": "attention", "window": 4}], "dim": 32, "layers": 1, "attach": attach}
    tokens = torch.randint(0, 256, (1, 20))
    other = torch.cat([(tokens[:, :1] + 1) % 256, tokens[:, 1:]], 1)
    for segment, reaches in ((8, True), (32, False)):
        model = compose({**data, "memory": [{"name": "infini", "segment": segment}]}, seed=0).double()
        assert (difference(model(tokens).y[:, 12:], model(other).y[:, 12:]) > 1e-9) == reaches


@torch.no_grad()
def test_masked_tokens_leave_everything_as_it_was() -> None:
    """A batch of nothing: no value, no share, and the state that was given."""
    heads = Heads(query=2, kv=1, key_dim=3, value_dim=3)
    for memory, width in ((Infini(InfiniConfig(segment=2), 8), 8), (Infini(InfiniConfig(segment=2), 8, heads), 12)):
        state = memory.scan(torch.randn(2, 5, width), memory.init_state(2)).state
        nothing = Context(mask=torch.zeros(2, 4, dtype=torch.bool))
        scan = memory.scan(torch.full((2, 4, width), float("nan")), state, nothing)
        assert state_difference(scan.state, state) == 0
        found = scan.read.value if scan.read.attended is None else scan.read.attended.value
        assert found is not None and found.shape[:2] == (2, 4) and (found == 0).all()


@torch.no_grad()
def test_its_state_is_of_one_size_and_outlives_a_checkpoint(tmp_path: Path) -> None:
    model = compose({"mixer": "mamba", "memory": [{"name": "infini", "segment": 4}], "dim": 32, "layers": 1}, seed=0)
    tokens = torch.randint(0, 256, (2, 9))
    state = model(tokens, state=model.init_state(2)).state
    assert state.bytes() == model.init_state(2).bytes()
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    assert torch.equal(again(tokens, state=state).y, model(tokens, state=state).y)


def test_the_gate_does_not_decay() -> None:
    model = compose({"mixer": "mamba", "memory": "infini", "dim": 32, "layers": 1})
    groups = optimizer_groups(model, lr=1e-3, weight_decay=0.1)
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in plain for name, p in model.named_parameters() if name.endswith("memory.gate"))


@pytest.mark.parametrize("dim", [16, 32, 64, 768])
@pytest.mark.parametrize("attach", ["residual", "kv"])
def test_the_defaults_work_at_every_width(dim: int, attach: str) -> None:
    data = {"mixer": "attention", "memory": "infini", "attach": attach, "dim": dim}
    resolve(recipe.load(data), registry.default())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment": 0}, "segment: input should be greater than 0"),
        ({"heads": 0}, "heads"),
        ({"heads": 33}, "33 heads leave none of its 32 channels to each; use 32 heads or fewer"),
        ({"update": "gated"}, "update: input should be 'linear' or 'delta'"),
        ({"heads": 3, "attach": "kv"}, "has the attention's heads of 4, not 3"),
        ({"attach": "tokens"}, "does not attach as 'tokens'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    own = {name: value for name, value in change.items() if name != "attach"}
    data = {"mixer": [{"name": "attention", "heads": 4}], "dim": 32, "memory": [{"name": "infini", **own}]}
    with pytest.raises(AltxError) as caught:
        compose(data | ({"attach": change["attach"]} if "attach" in change else {}))
    assert message in str(caught.value)
