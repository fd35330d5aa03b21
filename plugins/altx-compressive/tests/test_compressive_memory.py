"""It is the paper's algorithms, and compressive-transformer-pytorch; models with it; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from altx_compressive.config import CompressiveConfig
from altx_compressive.memory import Compressive
from safetensors.torch import load_file
from torch import Tensor

from altx import recipe, registry
from altx.checkpoint import load, save
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError
from altx.memory import NOTHING, split_heads
from altx.resolve import resolve
from altx.spec import Heads
from altx.testing.case import agitate, difference, state_difference
from altx.testing.partners import LocalAttention

UPSTREAM = load_file(Path(__file__).with_name("compressive_upstream_values.safetensors"))
"""SelfAttention of the package compressive-transformer-pytorch 0.4.0 in float64, in training, seed 0: width 8, 2 heads,
22 tokens in segments of 4, a memory of 4 and 5 compressed slots at a ratio of 2, with no positions; its output less
to_out's bias, and the loss of each segment. It compresses what W_k and W_v are then applied to; the convolutions of
keys and of values that are the same are W C_j W^-1 and W b. Its to_kv is frozen from the first step on (detach_)."""

HEADS = Heads(query=4, kv=2, key_dim=3, value_dim=5)
SMALL = {"segment": 4, "memory": 4, "compressed": 3, "ratio": 2}


def slots_of(memory: Compressive, keys_and_values: list[Tensor]) -> list[Tensor]:
    """Slots of one segment, token after token."""
    ratio, found = memory.config.ratio, []
    for start in range(0, len(keys_and_values), ratio):
        group = keys_and_values[start : start + ratio]
        if memory.config.compression == "mean":
            found.append(sum(group) / ratio)
        elif memory.config.compression == "max":
            found.append(torch.stack(group).max(0).values)
        else:
            wide = HEADS.kv * HEADS.key_dim
            halves = [[x[:wide] for x in group], [x[wide:] for x in group]]
            both = zip(memory.convolutions, halves, strict=True)
            found.append(
                torch.cat([sum(c.weight[:, :, j] @ h for j, h in enumerate(half)) + c.bias for c, half in both])
            )
    return found


def paper(memory: Compressive, x: Tensor) -> tuple[list[Tensor], float]:
    """Algorithms 1 and 2 for one sequence (T, width): what each token attends to (R, H, K + V), and the loss."""
    config, asking = memory.config, HEADS.query * HEADS.key_dim
    queue: list[Tensor] = []
    compressed: list[Tensor] = []
    seen, lost = [], 0.0
    for start in range(0, len(x), config.segment):
        segment = x[start : start + config.segment]
        shown = compressed + (queue if config.shown == "all" else [])
        seen += [torch.stack(shown) if shown else x.new_zeros(0, x.shape[1] - asking)] * len(segment)
        if len(segment) < config.segment:
            break
        queue = queue + [token[asking:] for token in segment]
        if len(queue) > config.memory:
            old, queue = queue[: config.segment], queue[config.segment :]
            new = slots_of(memory, old)
            compressed = (compressed + new)[-config.compressed :]
            q = segment[:, :asking].unflatten(-1, (HEADS.query, -1))
            error = attention(q, torch.stack(old)) - attention(q, torch.stack(new))
            lost += float((error**2).mean()) * len(segment)
    return seen, lost / len(x)


def attention(q: Tensor, kept: Tensor) -> Tensor:
    """(T, H, V) of queries (T, H, K), head by head."""
    k, v = kept.split([HEADS.kv * HEADS.key_dim, HEADS.kv * HEADS.value_dim], -1)
    k, v = k.unflatten(-1, (HEADS.kv, -1)), v.unflatten(-1, (HEADS.kv, -1))
    return torch.stack([(q[:, h] @ k[:, h // 2].T).softmax(-1) @ v[:, h // 2] for h in range(HEADS.query)], 1)


@torch.no_grad()
@pytest.mark.parametrize("compression", ["conv", "mean", "max"])
@pytest.mark.parametrize("sizes", [SMALL, {"segment": 3, "memory": 6, "compressed": 4, "ratio": 3, "shown": "all"}])
def test_it_is_the_papers_algorithms(compression: Any, sizes: dict[str, Any]) -> None:
    memory = agitate(Compressive(CompressiveConfig(**sizes, compression=compression), HEADS).double())
    x = torch.randn(2, 23, HEADS.width, dtype=torch.float64)
    scan = memory.scan(x, memory.init_state(2, dtype=torch.float64))
    found, loss = scan.read.attended, 0.0
    assert found is not None and found.share is None
    for row in range(2):
        seen, lost = paper(memory, x[row])
        loss += lost / 2
        for t, kept in enumerate(seen):
            q = split_heads(x[row : row + 1, t : t + 1], HEADS)[0][0]
            if not len(kept):
                assert (found.value[row, t] == 0).all() and (found.weight[row, t] == NOTHING).all()
                continue
            assert difference(found.value[row, t], attention(q, kept)[0]) < 1e-12
            keys = kept[:, : HEADS.kv * HEADS.key_dim].unflatten(-1, (HEADS.kv, -1))
            scores = torch.stack([keys[:, h // 2] @ q[0, h] for h in range(HEADS.query)])
            assert difference(found.weight[row, t], scores.logsumexp(-1)) < 1e-12
    losses = memory.write(x, memory.init_state(2, dtype=torch.float64))[1]
    assert {*losses} == {*scan.losses} == ({"reconstruction"} if compression == "conv" else set())
    for exact, in_shares in zip(losses.values(), scan.losses.values(), strict=True):
        assert abs(float(exact) - loss) < 1e-12 < loss
        # Shares of chunks are in float32.
        assert abs(float(in_shares) - loss) < 1e-6


@torch.no_grad()
def test_it_is_the_package_compressive_transformer_pytorch() -> None:
    model = compose(
        {
            "dim": 8,
            "mixer": [{"name": "attention", "heads": 2, "rotary": False}],
            "memory": [{"name": "compressive", **SMALL, "compressed": 5, "shown": "all"}],
            "layers": 1,
        }
    ).double()
    layer = next(module for module in model.modules() if type(module).__name__ == "KVAttach")
    layer.load_state_dict({n: w for n, w in UPSTREAM.items() if n.endswith(("weight", "bias"))})
    layer.mixer = LocalAttention(layer.mixer, 4)
    out = layer(UPSTREAM["x"])
    assert difference(out.y, UPSTREAM["y"]) < 1e-12
    # Theirs are means over segments, ours is one over the 22 tokens, with shares of each segment in float32.
    assert abs(float(out.losses["memory.reconstruction"] * 22 / 4 - UPSTREAM["losses"].sum())) < 1e-6


def test_the_loss_trains_the_convolutions_and_nothing_else() -> None:
    data = {"mixer": "attention", "memory": [{"name": "compressive", **SMALL}], "dim": 32, "layers": 2}
    model = compose(data, seed=0)
    out = model(torch.randint(0, 256, (2, 20)))
    assert {*out.losses} == {*model.loss_weights()} and len(out.losses) == 2
    sum(out.losses.values()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {name for name, _ in model.named_parameters() if ".convolutions." in name} != set()


@torch.no_grad()
def test_it_carries_what_a_window_no_longer_sees_as_far_as_it_has_slots() -> None:
    sizes = {"segment": 4, "memory": 4, "compressed": 4, "ratio": 2}
    data = {"mixer": [{"name": "attention", "window": 8}], "memory": [{"name": "compressive", **sizes}], "dim": 32}
    model = compose({**data, "layers": 1}, seed=0).double()
    tokens = torch.randint(0, 256, (1, 32))
    other = torch.cat([(tokens[:, :1] + 1) % 256, tokens[:, 1:]], 1)
    moved = [difference(model(tokens).y[:, t], model(other).y[:, t]) > 1e-12 for t in range(32)]
    # In sight itself up to 7, in slots up to 8 tokens more, which give way when their segments leave.
    assert moved == [True] * 16 + [False] * 16


@torch.no_grad()
def test_masked_tokens_leave_everything_as_it_was() -> None:
    """A batch of nothing: no key, no loss, and the state that was given."""
    memory = Compressive(CompressiveConfig(**SMALL), HEADS)
    state = memory.scan(torch.randn(2, 13, HEADS.width), memory.init_state(2)).state
    nothing = Context(mask=torch.zeros(2, 4, dtype=torch.bool))
    x = torch.full((2, 4, HEADS.width), float("nan"))
    scan = memory.scan(x, state, nothing)
    assert state_difference(scan.state, state) == 0 and not any(scan.losses.values())
    after, losses = memory.write(x, state, nothing)
    assert state_difference(after, state) == 0 and losses["reconstruction"] == 0
    assert scan.read.attended is not None and (scan.read.attended.value == 0).all()


@torch.no_grad()
def test_its_state_is_of_one_size_and_outlives_a_checkpoint(tmp_path: Path) -> None:
    data = {"mixer": "attention", "memory": [{"name": "compressive", **SMALL}], "dim": 32, "layers": 1}
    model, tokens = compose(data, seed=0), torch.randint(0, 256, (2, 15))
    state = model.init_state(2, capacity=40)
    moved = model(tokens, state=state).state
    assert moved.bytes() == state.bytes()
    save(model, tmp_path / "run")
    assert torch.equal(load(tmp_path / "run")(tokens, state=moved).y, model(tokens, state=moved).y)


@pytest.mark.parametrize("dim", [16, 32, 64, 768])
def test_the_defaults_work_at_every_width(dim: int) -> None:
    resolve(recipe.load({"mixer": "attention", "memory": "compressive", "dim": dim}), registry.default())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment": 0}, "segment: input should be greater than 0"),
        ({"memory": -1}, "memory: input should be greater than or equal to 0"),
        ({"compressed": 0}, "compressed: input should be greater than 0"),
        ({"ratio": 0}, "ratio: input should be greater than 0"),
        (
            {"segment": 12, "memory": 12, "ratio": 5},
            "ratio 5 does not divide a segment of 12 tokens; use a ratio of 3, 4, 6",
        ),
        ({"segment": 8, "memory": 12}, "memory 12 is no multiple of segment 8, by which it moves on; use 8 or 16"),
        ({"compressed": 100}, "100 compressed slots do not hold the 128 of one segment; use 128 or more"),
        ({"compression": "most-used"}, "compression: input should be 'conv', 'mean' or 'max'"),
        ({"attach": "residual"}, "does not attach as 'residual'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    own = {name: value for name, value in change.items() if name != "attach"}
    data = {"mixer": "attention", "dim": 32, "memory": [{"name": "compressive", **own}]}
    with pytest.raises(AltxError) as caught:
        compose(data | ({"attach": change["attach"]} if "attach" in change else {}))
    assert message in str(caught.value)
