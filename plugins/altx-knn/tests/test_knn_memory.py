"""What is found, by whom, and when."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from altx_knn.config import KNNConfig
from altx_knn.memory import KNN
from torch import Tensor

from altx import BuildContext, registry
from altx.attach import KVAttach
from altx.compose import build_branch, compose
from altx.config import ModelConfig, validate
from altx.context import Context
from altx.errors import ConfigError, StateError
from altx.generation import stream
from altx.memory import NOTHING, Memory, split_heads
from altx.resolve import resolve
from altx.spec import Heads
from altx.state import State
from altx.testing import prove
from altx.testing.case import Subject, agitate, difference, state_difference
from altx.testing.runner import run

HEADS = Heads(query=4, kv=2, key_dim=3, value_dim=5)
SETTINGS: list[dict[str, Any]] = [
    {"k": 3},
    {"k": 100},
    {"k": 3, "after": 6},
    {"k": 3, "size": 7},
    {"k": 2, "size": 11, "after": 3},
    {"k": 3, "size": 100, "full": "error"},
    {"k": 3, "search": "hnsw", "block": 8},
    {"k": 2, "search": "hnsw", "block": 8, "size": 14, "after": 7},
    {"k": 2, "search": "hnsw", "block": 4, "size": 5},
    {"k": 3, "block": 8, "path": "store"},
    {"k": 2, "block": 4, "path": "store", "size": 7, "after": 2},
    {"k": 3, "search": "hnsw", "block": 8, "path": "store", "size": 18},
]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def memory(**settings: Any) -> KNN:
    config = KNNConfig(**{"segment": 4, **settings})
    config.fit(16)
    return KNN(config, HEADS).double()


def tokens(batch: int, length: int, seed: int = 0, width: int = HEADS.width) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def brute_force(x: Tensor, config: KNNConfig) -> tuple[Tensor, Tensor]:
    """What the tokens of one sequence x (T, width) find, by a loop over all: values (T, H, Dv), weights (T, H)."""
    q, k, v = (t[0] for t in split_heads(x[None], HEADS))
    value, weight = torch.zeros(len(x), 4, 5, dtype=x.dtype), torch.full((len(x), 4), NOTHING, dtype=x.dtype)
    for i in range(len(x)):
        done = i // config.segment * config.segment
        oldest = 0 if config.size is None else max(0, done - config.size)
        there = [j for j in range(oldest, done) if i - j >= config.after]
        for h in range(4) if there else []:
            score = k[there, h // 2] @ q[i, h]
            best = score.topk(min(config.k, len(there)))
            value[i, h] = best.values.softmax(0) @ v[torch.tensor(there)[best.indices], h // 2]
            weight[i, h] = best.values.logsumexp(0)
    return value, weight


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_brute_force(settings: dict[str, Any]) -> None:
    layer, x = memory(**settings), tokens(3, 37)
    found = layer.scan(x, layer.init_state(3, dtype=torch.float64)).read.attended
    assert found
    for row in range(3):
        value, weight = brute_force(x[row], layer.config)
        assert difference(found.value[row], value) < 1e-12
        assert difference(found.weight[row], weight) < 1e-12


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_of_their_own_lengths_and_sequences_find_what_they_would_alone(settings: dict[str, Any]) -> None:
    """In calls of any cut, with masked tokens between, and sequences that end where they please."""
    layer, x = memory(**settings), tokens(3, 45)
    mask = torch.rand(3, 45, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[2] = True
    reset = torch.zeros(3, 45, dtype=torch.bool)
    reset[0, 20] = reset[0, 21] = reset[1, 9] = True
    reset[0, 5] = not mask[0, 5]
    x = x.masked_fill(~mask[..., None], torch.nan)
    state, values, weights = layer.init_state(3, dtype=torch.float64), [], []
    for start, stop in ((0, 6), (6, 7), (7, 7), (7, 22), (22, 45)):
        ctx = Context(mask=mask[:, start:stop], reset=reset[:, start:stop])
        scan = layer.scan(x[:, start:stop].nan_to_num(7.0), state, ctx)
        state = scan.state
        assert scan.read.attended
        values.append(scan.read.attended.value)
        weights.append(scan.read.attended.weight)
    for row in range(3):
        real = x[row][mask[row]]
        cuts = (reset[row][mask[row]]).nonzero().flatten().tolist()
        parts = [brute_force(part, layer.config) for part in real.tensor_split(cuts)]
        for found, wanted in zip((values, weights), zip(*parts, strict=True), strict=True):
            assert difference(torch.cat(found, 1)[row][mask[row]], torch.cat(wanted)) < 1e-12


def attached(attention: dict[str, Any], **settings: Any) -> KVAttach:
    """Attention with a memory, as composed."""
    parts = {"mixer": {"name": "attention", **attention}, "memory": {"name": "knn", **settings}, "attach": "kv"}
    blueprint = resolve(validate(ModelConfig, {"dim": 16, "blocks": [{"sublayers": [parts]}]}), registry.default())
    torch.manual_seed(0)
    layer = build_branch(blueprint.blocks[0][0], BuildContext(dim=16))
    assert isinstance(layer, KVAttach)
    return layer


@pytest.mark.parametrize("settings", [{}, {"search": "hnsw", "block": 8}, {"block": 4, "path": "store"}], ids=str)
@pytest.mark.parametrize("kv_heads", [None, 1, 2])
def test_a_window_and_a_memory_of_all_before_it_is_attention_to_all(kv_heads: int | None, settings: dict) -> None:
    """No token is counted twice, and none is missed."""
    attention = {"heads": 4, "kv_heads": kv_heads, "rotary": False}
    near = attached({**attention, "window": 6}, segment=4, after=6, k=50, **settings)
    whole = attached(attention)
    agitate(near).double()
    whole.double().mixer.load_state_dict(near.mixer.state_dict())
    x = tokens(2, 33, width=16)
    assert difference(near(x).y, whole.mixer(x).y) < 1e-12


@pytest.mark.parametrize(
    "attention", [{}, {"kv_heads": 1}, {"window": 3}, {"kv_heads": 2, "window": 4, "qk_norm": "head", "sinks": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "settings", [{}, {"gate": True, "size": 9}, {"search": "hnsw", "block": 7, "after": 3}], ids=str
)
def test_with_attention_it_obeys_the_laws_of_a_layer(attention: dict[str, Any], settings: dict[str, Any]) -> None:
    results = run(Subject("knn", lambda: attached(attention, segment=7, k=3, **settings)))
    assert [(r.check, r.message) for r in results if r.status == "failed"] == []
    assert {"steps", "causality", "padding", "select", "save-restore"} <= {
        r.check for r in results if r.status == "passed"
    }


@pytest.mark.parametrize("settings", [{"size": 12}, {"block": 8, "path": "store"}], ids=str)
def test_a_model_with_memories_in_two_layers_is_proved_and_generates(settings: dict[str, Any]) -> None:
    mixer, knn = {"name": "attention", "window": 4}, {"name": "knn", "segment": 4, "after": 4, "k": 3, **settings}
    model = compose({"dim": 16, "mixer": [mixer], "memory": [knn], "layers": 2}, seed=0).double().eval()
    assert [r for r in prove(model) if r.status == "failed"] == []
    prompt = torch.randint(256, (2, 11), generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([*stream(model, prompt, max_new_tokens=20, temperature=0)], 1)
    with torch.no_grad():
        whole = model(torch.cat([prompt, drawn], 1)).y
    assert torch.equal(whole[:, 10:-1].argmax(-1), drawn)


def test_a_gate_mixes_what_attention_and_memory_say_by_a_learned_share() -> None:
    """Section 3.2: V = g V_m + (1 - g) V_c, with g = sigmoid(b) of each head."""
    layer = attached({"heads": 2, "rotary": False, "window": 3}, segment=4, k=3, gate=True).double()
    near = copy.deepcopy(layer.mixer)
    x, (shut, half) = tokens(1, 12, width=16), (-1e3, 0.0)
    with torch.no_grad():
        layer.memory.gate.copy_(torch.tensor([shut, half]))
    heads: list[Tensor] = []
    for each in (layer.mixer, near):
        each.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    layer(x), near(x)
    mixed, alone = (y.unflatten(-1, (2, 8)) for y in heads)
    assert difference(mixed[:, :, 0], alone[:, :, 0]) < 1e-12
    assert difference(mixed[:, :4], alone[:, :4]) < 1e-12
    far = layer.memory.scan(handed(layer, x), layer.memory.init_state(1, dtype=x.dtype)).read.attended
    assert difference(mixed[:, 4:, 1], (alone[:, 4:, 1] + far.value[:, 4:, 1]) / 2) < 1e-12


def handed(layer: KVAttach, x: Tensor) -> Tensor:
    """What the attention hands over for x."""
    mixer = layer.mixer
    return torch.cat([mixer.q_proj(x) * mixer.hands.key_dim**-0.5, mixer.k_proj(x), mixer.v_proj(x)], -1)


def test_gradients_reach_queries_and_never_what_is_stored() -> None:
    """The slope of a query is that of a softmax over constants; stored tokens have none."""
    layer, x = memory(k=3), tokens(1, 8).requires_grad_()
    found = layer.scan(x, layer.init_state(1, dtype=torch.float64)).read.attended
    assert found
    (found.value[:, 4:].sum() + found.weight[:, 4:].sum()).backward()
    assert x.grad is not None and not x.grad[:, :4].any()
    queries = HEADS.query * HEADS.key_dim
    assert x.grad[:, 4:, :queries].all() and not x.grad[:, :, queries:].any()
    after, step = layer.write(x[:, :4].detach(), layer.init_state(1, dtype=torch.float64))[0], torch.zeros_like(x)
    assert not any(leaf.requires_grad for leaf in after.leaves.values())
    for index in (0, 5, 11):
        values = []
        for sign in (1e-6, -1e-6):
            step[0, 6, index] = sign
            read = layer.read((x + step)[:, 4:].detach(), after)[0].attended
            assert read
            values.append(float(read.value.sum() + read.weight.sum()))
        step.zero_()
        assert abs((values[0] - values[1]) / 2e-6 - float(x.grad[0, 6, index])) < 1e-6


def test_the_state_holds_no_graph_of_the_call() -> None:
    layer = attached({}, segment=4, k=2).double()
    state = layer(tokens(1, 9, width=16), state=layer.init_state(1)).state
    assert state and not any(leaf.requires_grad for leaf in state.children["memory"].leaves.values())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_forks_do_not_see_what_the_other_writes(settings: dict[str, Any]) -> None:
    layer, start = memory(**settings), tokens(1, 17)
    trunk = layer.scan(start, layer.init_state(1, dtype=torch.float64)).state
    kept = trunk.clone()
    branches = [tokens(1, 19, seed) for seed in (1, 2)]
    ends = [layer.scan(branch, trunk).state for branch in branches]
    assert state_difference(trunk, kept) == 0
    for branch, end in zip(branches, ends, strict=True):
        query = tokens(1, 3, 5)
        there = layer.scan(query, end).read.attended
        fresh = memory(**settings)
        alone = fresh.scan(torch.cat([start, branch, query], 1), fresh.init_state(1, dtype=torch.float64))
        assert there and alone.read.attended
        assert difference(there.value, alone.read.attended.value[:, -3:]) < 1e-12


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_tokens_after_others_are_not_the_same(settings: dict[str, Any]) -> None:
    """Two rows whose last blocks agree in every bit, and not those before."""
    layer, x = memory(**settings), tokens(2, 33)
    x[1, 8:] = x[0, 8:]
    found = layer.scan(x, layer.init_state(2, dtype=torch.float64)).read.attended
    assert found
    for row in range(2):
        assert difference(found.value[row], brute_force(x[row], layer.config)[0]) < 1e-12


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("search") == "hnsw" or "path" in s], ids=str)
def test_what_is_at_hand_can_be_lost(settings: dict[str, Any]) -> None:
    """Graphs are found anew from the state, or from disk, by a model that never saw them."""
    layer, x = memory(**settings), tokens(2, 29)
    state = layer.scan(x, layer.init_state(2, dtype=torch.float64)).state
    query = tokens(2, 9, 1)
    wanted = layer.scan(query, state)
    for other in (memory(**settings), copy.deepcopy(layer)):
        found = other.scan(query, state.from_flat({name: t.clone() for name, t in state.flat().items()}))
        assert found.read.attended and wanted.read.attended
        assert torch.equal(found.read.attended.value, wanted.read.attended.value)
        assert state_difference(found.state, wanted.state) == 0


def test_graphs_at_hand_do_not_pile_up() -> None:
    layer = memory(k=3, search="hnsw", block=8, size=16)
    for seed in range(12):
        layer.scan(tokens(2, 80, seed), layer.init_state(2, dtype=torch.float64))
        assert layer.blocks and len(layer.blocks.latest) <= 4 and len(layer.blocks.known) <= 4 * 4


def test_a_graph_finds_most_of_what_is_nearest() -> None:
    """In 4,096 tokens of which every 64 are near each other."""
    heads = Heads(query=1, kv=1, key_dim=16, value_dim=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4096 + 64, heads.width, generator=generator)
    x[..., 16:32] = torch.randn(65, 16, generator=generator).repeat_interleave(64, 0) + x[..., 16:32] / 4
    x[..., :16] = x[..., 16:32].roll(64, 1)
    found = []
    for search in ("exact", "hnsw"):
        layer = KNN(KNNConfig.model_validate({"segment": 64, "k": 16, "search": search, "block": 1024}), heads)
        state = layer.write(x[:, :4096], layer.init_state(1))[0]
        read = layer.read(x[:, 4096:], state)[0].attended
        assert read
        found.append(read.weight)
    assert (found[1] <= found[0] + 1e-4).all()
    assert float((found[1] > found[0] - 1e-4).float().mean()) > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [{"k": 40}, {"k": 40, "block": 8, "path": "store", "search": "hnsw"}], ids=str)
def test_lower_precision_is_near(settings: dict[str, Any], dtype: torch.dtype) -> None:
    layer, x = memory(**settings), tokens(2, 30).to(dtype)
    found = layer.scan(x, layer.init_state(2, dtype=dtype)).read.attended
    wanted = memory(k=40).scan(x.double(), memory(k=40).init_state(2, dtype=torch.float64)).read.attended
    assert found and wanted and found.value.dtype == dtype
    assert difference(found.value.double(), wanted.value) < (2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_fewer_keys_than_k_are_all_found_and_none_is_no_error() -> None:
    layer = memory(k=30)
    found = layer.read(tokens(1, 2), layer.init_state(1, dtype=torch.float64))[0].attended
    assert found and (found.weight == NOTHING).all() and not found.value.any()


def test_a_store_that_is_full_says_so_or_lets_the_oldest_leave() -> None:
    layer = memory(size=12, k=2, full="error")
    state = layer.write(tokens(2, 12), layer.init_state(2, dtype=torch.float64))[0]
    with pytest.raises(StateError, match=r"full: size is 12 tokens, and row 1 has more(?s:.*)full: oldest"):
        layer.write(tokens(2, 1), state, Context(mask=torch.tensor([[False], [True]])))
    # A new sequence has all the room again.
    assert layer.write(tokens(2, 12), state, Context(reset=torch.arange(12).expand(2, -1) == 0))[0].seen is not None


def test_a_limited_store_does_not_grow_and_an_unlimited_one_is_cropped() -> None:
    layer = memory(size=12, k=2)
    fresh = layer.init_state(1)
    assert layer.scan(tokens(1, 50).float(), fresh).state.bytes() == fresh.bytes()
    layer, x = memory(k=2), tokens(1, 11)
    whole = layer.scan(x, layer.init_state(1, dtype=torch.float64)).state.crop(4)
    short = layer.scan(x[:, :7], layer.init_state(1, dtype=torch.float64)).state
    assert state_difference(whole, short) == 0


def test_states_of_another_batch_or_model_are_refused() -> None:
    layer = memory()
    with pytest.raises(StateError, match="the state has 3 rows, not 2"):
        layer.scan(tokens(2, 3), layer.init_state(3))
    other = KNN(KNNConfig(), Heads(query=4, kv=1, key_dim=3, value_dim=6)).init_state(2)
    with pytest.raises(StateError, match="1 heads of keys, not 2; 6 numbers in a value, not 5"):
        layer.scan(tokens(2, 3), other)
    with pytest.raises(StateError, match="the state has 12 slots, not 24"):
        memory(size=20, k=2).scan(tokens(2, 3), memory(size=8, k=2).init_state(2))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"k": 9, "size": 8}, "k 9 is more than the 8 tokens of size; use k 8 or less"),
        ({"full": "error"}, "full: error needs a size"),
        ({"search": "hnsw", "segment": 512, "block": 1000}, "block 1000 is no multiple of segment 512; use 512"),
        ({"search": "hnsw", "ef": 8}, "ef 8 is less than k 32; use 32 or more"),
        ({"k": 0}, "k: .*greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose({"dim": 16, "mixer": "attention", "memory": [{"name": "knn", **settings}]})


def test_it_reads_before_it_writes() -> None:
    """Nothing that is written in a call changes what the same call's earlier tokens find."""
    layer = memory(k=3, segment=1)
    scan = layer.scan(tokens(1, 5), layer.init_state(1, dtype=torch.float64))
    assert scan.read.attended and scan.read.attended.weight[0, 0, 0] == NOTHING
    plain = Memory.scan(layer, tokens(1, 5), layer.init_state(1, dtype=torch.float64))
    assert state_difference(scan.state, plain.state) == 0


def test_a_donated_state_is_written_to_in_place() -> None:
    layer = memory(k=3)
    state = layer.init_state(1, capacity=20, dtype=torch.float64)
    after: State = layer.scan(tokens(1, 9), state, Context(donate_state=True)).state
    assert after["keys"].data_ptr() == state["keys"].data_ptr()
    kept = after.clone()
    layer.scan(tokens(1, 3), after)
    assert state_difference(after, kept) == 0
