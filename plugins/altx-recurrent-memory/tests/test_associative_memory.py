"""`associative-recurrent-memory` is the authors' code, and the paper's equations; models with it; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from altx_recurrent_memory.associative import KEPT, Association
from altx_recurrent_memory.config import AssociativeConfig
from safetensors.torch import load_file
from torch import Tensor

from altx import recipe, registry
from altx.checkpoint import load, save
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError
from altx.optim import optimizer_groups
from altx.resolve import resolve
from altx.state import State
from altx.testing import prove
from altx.testing.case import agitate, difference, state_difference

OFFICIAL = load_file(Path(__file__).with_name("associative_upstream_values.safetensors"))
"""AssociativeLayerWrapper of github.com/RodkinIvan/associative-recurrent-memory-transformer, modeling_amt/
language_modeling.py at commit aa145de, in float64, one around each of the two blocks of the model below: over 23 tokens
in segments of 5 with 2 memory tokens behind each, with and without `correction`. Weights as ours, agitated. "gradient"
is that of the sum of outputs weighted by linspace(-1, 1), by the memory tokens."""

SMALL = {"memory": [{"name": "associative-recurrent-memory", "tokens": 2, "segment": 4, "key_dim": 3}], "dim": 32}


def loop_of(model: Any) -> Any:
    return next(module for module in model.modules() if type(module).__name__ == "SegmentLoop")


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("pieces", [[23], [4, 1, 1, 9, 8]])
def test_it_is_the_authors_code(correction: bool, pieces: list[int]) -> None:
    vectors = {"kind": "vectors", "size": 8}
    memory = {"tokens": 2, "segment": 5, "key_dim": 3, "order": 3, "correction": correction}
    model = compose(
        {
            "dim": 8, "input": vectors, "head": vectors, "layers": 2,
            "mixer": [{"name": "attention", "heads": 2}], "feed_forward": [{"name": "swiglu", "hidden": 12}],
            "memory": [{"name": "associative-recurrent-memory", **memory}],
        }
    ).double()  # fmt: skip
    loop = loop_of(model)
    loop.load_state_dict({n.removeprefix("weight."): w for n, w in OFFICIAL.items() if n.startswith("weight.")})
    state, ys = loop.init_state(2, dtype=torch.float64), []
    for piece in OFFICIAL["x"].split(pieces, 1):
        out = loop(piece, Context(), state)
        state = out.state
        ys.append(out.y)
    y = torch.cat(ys, 1)
    assert difference(y, OFFICIAL[f"y_{correction}"]) < 1e-8
    (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)).sum().backward()
    assert difference(loop.memory.memory.grad, OFFICIAL[f"gradient_{correction}"]) < 1e-8


@torch.no_grad()
def test_it_is_the_papers_equations() -> None:
    """One memory token after the other, and each feature by itself."""
    order, width, dim = 2, 3, 4
    block = agitate(Association(AssociativeConfig(order=order, key_dim=width), dim)).double()

    def phi(x: Tensor) -> Tensor:
        both = [max(0.0, float(c)) for c in x] + [max(0.0, -float(c)) for c in x]
        n = len(both)
        products = [both[i] * both[(i - j) % n] for j in range(1, order + 1) for i in range(n)]
        return torch.tensor(products, dtype=torch.float64)

    count = 2 * width * order
    A, z = torch.zeros(dim, count).double(), torch.zeros(count).double()
    state = State({"matrix": A.T[None], "norm": z[None]}, {"matrix": KEPT, "norm": KEPT})
    for segment in range(3):
        u = torch.randn(5, dim).double()
        state, old_A, old_z = block.write(u[None], state, None), A, z
        for m in u:
            key = phi(block.k_proj.weight @ m)
            share = float(old_z @ key) + 1e-5
            beta = torch.sigmoid(block.rate_proj.weight[0] @ m + block.rate_proj.bias[0])
            A = A + beta * torch.outer(block.v_proj.weight @ m - old_A @ key / share, key)
            gamma = 1 - share / (float(key @ key) + 1e-5) if segment else 1.0
            z = z + min(1.0, max(0.0, gamma)) * key
        x = torch.randn(dim).double()
        query = phi(block.q_proj.weight @ x)
        assert difference(block.read(x[None, None], state)[0, 0], A @ query / (float(z @ query) + 1e-5)) < 1e-12


@torch.no_grad()
def test_a_memory_that_has_learned_nothing_is_silent() -> None:
    """Its values are 0 at the start, and then no segment hears of another; with values it does, in the first block."""
    model = compose({**SMALL, "mixer": "attention", "layers": 1}, seed=0).double()
    tokens = torch.randint(0, 256, (1, 12))
    other = torch.cat([(tokens[:, :1] + 1) % 256, tokens[:, 1:]], 1)
    assert difference(model(other).y[:, 4:], model(tokens).y[:, 4:]) == 0
    torch.nn.init.normal_(loop_of(model).memory.associations[0].v_proj.weight)
    assert difference(model(other).y[:, 4:], model(tokens).y[:, 4:]) > 1e-9


def test_blocks_of_several_kinds_run_with_it() -> None:
    results = prove(compose({**SMALL, "mixer": "attention,mamba", "layers": 2}, seed=0))
    assert [(r.check, r.message) for r in results if r.status != "passed"] == []


@torch.no_grad()
def test_its_state_is_of_one_size_and_outlives_a_checkpoint(tmp_path: Path) -> None:
    model = agitate(compose({**SMALL, "mixer": "attention", "layers": 2}, seed=0))
    state, tokens = model.init_state(2), torch.randint(0, 256, (2, 11))
    moved = model(tokens, state=state).state
    assert moved.bytes() == state.bytes() and moved.tokens.tolist() == [11, 11]
    save(model, tmp_path / "run")
    assert torch.equal(load(tmp_path / "run")(tokens, state=moved).y, model(tokens, state=moved).y)


@torch.no_grad()
def test_masked_tokens_leave_everything_as_it_was() -> None:
    model = agitate(compose({**SMALL, "mixer": "attention", "layers": 2}, seed=0))
    tokens = torch.randint(0, 256, (2, 11))
    state = model(tokens, state=model.init_state(2)).state
    nothing = model(tokens, Context(mask=torch.zeros(2, 11, dtype=torch.bool)), state)
    assert state_difference(nothing.state, state) == 0


def test_memory_tokens_do_not_decay() -> None:
    model = compose({**SMALL, "mixer": "attention", "layers": 1})
    groups = optimizer_groups(model, lr=1e-3, weight_decay=0.1)
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(loop_of(model).memory.memory) in plain


@pytest.mark.parametrize("dim", [16, 32, 64, 768])
def test_the_defaults_work_at_every_width(dim: int) -> None:
    data = {"mixer": "attention", "memory": "associative-recurrent-memory", "dim": dim}
    resolve(recipe.load(data), registry.default())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens: input should be greater than 0"),
        ({"segment": 0}, "segment: input should be greater than 0"),
        ({"key_dim": 0}, "key_dim: input should be greater than 0"),
        (
            {"key_dim": 2, "order": 4},
            "order 4 is not less than 2 key_dim = 4, the channels to multiply with; use order",
        ),
        ({"attach": "residual"}, "does not attach as 'residual'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    own = {name: value for name, value in change.items() if name != "attach"}
    data = {"mixer": "attention", "dim": 32, "memory": [{"name": "associative-recurrent-memory", **own}]}
    with pytest.raises(AltxError) as caught:
        compose(data | ({"attach": change["attach"]} if "attach" in change else {}))
    assert message in str(caught.value)
