"""Its step is the authors' code; what tokens hear of it; models with it; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from altx_token_turing.config import TokenTuringConfig
from altx_token_turing.memory import TokenTuring
from altx_token_turing.unit import Unit
from safetensors.torch import load_file
from torch import Tensor

from altx import recipe, registry
from altx.checkpoint import load, save
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, UnsupportedContext
from altx.optim import optimizer_groups
from altx.resolve import resolve
from altx.testing.case import agitate, difference, state_difference

OFFICIAL = load_file(Path(__file__).with_name("token_turing_upstream_values.safetensors"))
"""TokenTuringMachineEncoder of github.com/google-research/scenic, projects/token_turing/model.py at commit 4a38d47, run
by flax 0.12.8 in float64: width 8, memory_size 4, process_size 3, memory_mode TL, a transformer of 2 layers, 2 heads
and mlp_dim 12, over 3 steps of 5 tokens. Weights, named as ours, are as it makes them plus 0.3 normal noise; those of
its biases that a softmax cancels are left out."""

SMALL = {"frame": 4, "memory": 3, "process": 2, "bottleneck": 5}


@torch.no_grad()
def test_its_step_is_the_authors_code() -> None:
    unit = Unit(8, memory=4, process=3, layers=2, heads=2, hidden=12, bottleneck=64).double()
    unit.load_state_dict({n: w for n, w in OFFICIAL.items() if n not in ("frames", "outputs")})
    memory, found = torch.zeros(2, 4, 8, dtype=torch.float64), []
    for frame in OFFICIAL["frames"].unbind(1):
        output = unit.read(memory, frame)
        memory = unit.write(memory, frame, output)
        found.append(output)
    assert difference(torch.stack(found, 1), OFFICIAL["outputs"]) < 1e-12


def outputs(memory: TokenTuring, x: Tensor) -> list[Tensor]:
    """What each frame of x (B, T, D) is made, the last as far as it is there."""
    held, found = torch.zeros(len(x), memory.config.memory, x.shape[2], dtype=x.dtype), []
    for frame in x.split(memory.config.frame, 1):
        found.append(memory.unit.read(held, frame))
        held = memory.unit.write(held, frame, found[-1])
    return found


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_hears_its_own_frame_in_an_encoder_and_the_one_before_in_a_causal_model(causal: bool) -> None:
    memory = agitate(TokenTuring(TokenTuringConfig(**SMALL), 8).double())
    x = torch.randn(2, 14, 8, dtype=torch.float64)
    heard = outputs(memory, x)
    if causal:
        heard = [torch.zeros_like(heard[0]), *heard[:-1]]
    wanted = [
        torch.sigmoid(memory.mix(memory.norm(x[:, t]))).unsqueeze(1) @ heard[t // memory.config.frame]
        for t in range(x.shape[1])
    ]
    value = memory.scan(x, memory.init_state(2, dtype=torch.float64), Context(causal=causal)).read.value
    assert value is not None and difference(value, torch.cat(wanted, 1)) < 1e-12


@torch.no_grad()
def test_in_an_encoder_a_frame_is_heard_from_its_first_token_on_and_earlier_ones_through_memory() -> None:
    head = {"kind": "vectors", "size": 3}
    data = {"blocks": [{"sublayers": [{"memory": {"name": "token-turing", **SMALL}}]}], "dim": 32}
    model = compose({**data, "causal": False, "head": head}, seed=0).double()
    tokens = torch.randint(0, 256, (1, 12))
    y = model(tokens).y

    def moved(place: int) -> list[bool]:
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 256
        return [difference(model(other).y[:, t], y[:, t]) > 1e-12 for t in range(12)]

    assert moved(7) == [False] * 4 + [True] * 8


@torch.no_grad()
def test_an_encoder_does_not_go_on_with_an_open_frame() -> None:
    memory, x = TokenTuring(TokenTuringConfig(**SMALL), 8), torch.randn(1, 6, 8)
    state = memory.scan(x, memory.init_state(1)).state
    with pytest.raises(UnsupportedContext, match="a frame that looks both ways is read whole"):
        memory.scan(x, state, Context(causal=False))
    memory.scan(x, memory.scan(x[:, :2], state).state, Context(causal=False))


@torch.no_grad()
def test_masked_tokens_leave_everything_as_it_was() -> None:
    memory = agitate(TokenTuring(TokenTuringConfig(**SMALL), 8))
    state = memory.scan(torch.randn(2, 9, 8), memory.init_state(2)).state
    for causal in (True, False):
        nothing = Context(causal=causal, mask=torch.zeros(2, 4, dtype=torch.bool))
        scan = memory.scan(torch.full((2, 4, 8), float("nan")), state, nothing)
        assert state_difference(scan.state, state) == 0
        assert scan.read.value is not None and scan.read.value.isfinite().all()


@torch.no_grad()
def test_its_state_is_of_one_size_and_outlives_a_checkpoint(tmp_path: Path) -> None:
    data = {"mixer": "mamba", "memory": [{"name": "token-turing", **SMALL}], "dim": 32, "layers": 1}
    model, tokens = compose(data, seed=0), torch.randint(0, 256, (2, 11))
    state = model.init_state(2)
    moved = model(tokens, state=state).state
    assert moved.bytes() == state.bytes()
    save(model, tmp_path / "run")
    assert torch.equal(load(tmp_path / "run")(tokens, state=moved).y, model(tokens, state=moved).y)


def test_positions_do_not_decay() -> None:
    model = compose({"mixer": "mamba", "memory": "token-turing", "dim": 32, "layers": 1})
    groups = optimizer_groups(model, lr=1e-3, weight_decay=0.1)
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in plain for name, p in model.named_parameters() if name.endswith("unit.position"))


@pytest.mark.parametrize("dim", [16, 32, 64, 768])
def test_the_defaults_work_at_every_width(dim: int) -> None:
    resolve(recipe.load({"mixer": "attention", "memory": "token-turing", "dim": dim}), registry.default())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame": 0}, "frame: input should be greater than 0"),
        ({"memory": 0}, "memory: input should be greater than 0"),
        ({"process": 0}, "process: input should be greater than 0"),
        ({"layers": 0}, "layers: input should be greater than 0"),
        ({"heads": 5}, "5 heads do not divide dim 32; use 1, 2, 4, 8, 16, 32 heads"),
        ({"expansion": 0.01}, "expansion 0.01 of dim 32 leaves no hidden unit"),
        ({"attach": "kv"}, "does not attach as 'kv'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    own = {name: value for name, value in change.items() if name != "attach"}
    data = {"mixer": "attention", "dim": 32, "memory": [{"name": "token-turing", **own}]}
    with pytest.raises(AltxError) as caught:
        compose(data | ({"attach": change["attach"]} if "attach" in change else {}))
    assert message in str(caught.value)
