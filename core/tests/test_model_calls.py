"""A call of a model that it cannot honour is refused, and says what it would have honoured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from altx.adapters import Unpack
from altx.compose import compose
from altx.context import Context, Cross, Graph
from altx.errors import StateError, UnsupportedContext
from altx.model import Model
from altx.registry import Registry
from altx.state import State

VECTORS = {"input": {"kind": "vectors", "size": 3}, "head": {"kind": "classifier", "classes": 5}}


def test_a_context_that_a_part_cannot_honour_is_refused(toy: Registry) -> None:
    model = compose({"mixer": "block", "dim": 16, "causal": False, **VECTORS}, plugins=toy)
    with pytest.raises(UnsupportedContext, match=r"body.*cannot honour ctx\.mask"):
        model(torch.randn(2, 4, 3), Context(mask=torch.ones(2, 4, dtype=torch.bool)))


REAL = torch.ones(2, 6, dtype=torch.bool)
WRONG_CALLS = [
    (Context(mask=REAL[:, :5]), r"ctx\.mask must be \(2, 6\) bool, as the inputs are; it is \(2, 5\) bool"),
    (Context(mask=REAL.long()), r"it is \(2, 6\) int64"),
    (Context(reset=REAL[:1]), r"ctx\.reset must be"),
    (Context(reset=REAL[..., None]), r"ctx\.reset must be .*; it is \(2, 6, 1\) bool"),
    (Context(positions=torch.zeros(6)), r"ctx\.positions must be"),
    (Context(positions=torch.zeros(2, 6)), r"ctx\.positions must be \(2, 6\) int64, .*; it is \(2, 6\) float32"),
    (Context(cross=Cross(torch.zeros(2, 3, 16))), r"cannot honour ctx\.cross"),
    (Context(graph=Graph(torch.zeros(2, 0, dtype=torch.int64))), r"has no use for a ctx\.graph"),
    (Context(cu_seqlens=torch.tensor([0, 6])), "a packed batch has one row, not 2"),
]


@pytest.mark.parametrize(("ctx", "message"), WRONG_CALLS, ids=[message[:24] for _, message in WRONG_CALLS])
def test_a_wrong_call_is_named(toy: Registry, ctx: Context, message: str) -> None:
    model = compose({"mixer": "average", "dim": 16}, plugins=toy)
    with pytest.raises(UnsupportedContext, match=message):
        model(torch.zeros(2, 6, dtype=torch.int64), ctx)


WRONG_INPUTS = [
    ({}, torch.zeros(6, dtype=torch.int64), r"must be \(B, T\) int64 tokens; they are \(6,\) int64"),
    ({}, torch.zeros(2, 6, 3, dtype=torch.int64), r"they are \(2, 6, 3\) int64"),
    ({}, torch.zeros(2, 6), r"they are \(2, 6\) float32"),
    ({}, torch.tensor([[0, 256]]), "tokens are 0 to 255; the inputs hold 0 to 256"),
    ({}, torch.tensor([[0, -1]]), "tokens are 0 to 255; the inputs hold -1 to 0"),
    (VECTORS, torch.zeros(2, 6, 4), r"must be \(B, T, 3\) vectors; they are \(2, 6, 4\) float32"),
    (VECTORS, torch.zeros(2, 6, 3, dtype=torch.int64), r"they are \(2, 6, 3\) int64"),
]


@pytest.mark.parametrize(("given", "inputs", "message"), WRONG_INPUTS, ids=[message for *_, message in WRONG_INPUTS])
def test_wrong_inputs_are_named(toy: Registry, given: dict[str, Any], inputs: torch.Tensor, message: str) -> None:
    model = compose({"mixer": "average", "dim": 16, **given}, plugins=toy)
    with pytest.raises(UnsupportedContext, match=message):
        model(inputs)


PACKED = pytest.mark.parametrize("packing", [False, True], ids=["unpacked", "packing"])


def packed(toy: Registry, packing: bool) -> Model:
    """A model whose layers read packed batches themselves, or one that unpacks them."""
    layer = {"feed_forward": "swiglu"} if packing else {"mixer": "average"}
    model = compose({"blocks": [{"sublayers": [layer]}], "dim": 16}, plugins=toy)
    assert model.capabilities.packing and isinstance(model.body, Unpack) is not packing
    return model


@PACKED
@pytest.mark.parametrize("bounds", [[0, 4], [1, 6], [0, 5, 3, 6], [0, 9, 6], [-1, 6], [0]], ids=str)
def test_bounds_of_packed_sequences_must_cover_the_tokens(toy: Registry, bounds: list[int], packing: bool) -> None:
    with pytest.raises(UnsupportedContext, match=r"must rise from 0 to the 6 tokens there are; it is \["):
        packed(toy, packing)(torch.zeros(1, 6, dtype=torch.int64), Context(cu_seqlens=torch.tensor(bounds)))


WRONG_BOUNDS = [torch.tensor([[0, 6]]), torch.tensor([0.0, 6.0]), torch.tensor([0, 6]).int(), torch.tensor([]).long()]


@PACKED
@pytest.mark.parametrize("bounds", WRONG_BOUNDS, ids=str)
def test_bounds_of_packed_sequences_are_a_list_of_integers(toy: Registry, bounds: torch.Tensor, packing: bool) -> None:
    wanted = r"must be \(N\+1,\) int64; it is .*\n.*such as torch\.tensor\(\[0, 5, 12\]\)"
    with pytest.raises(UnsupportedContext, match=wanted):
        packed(toy, packing)(torch.zeros(1, 6, dtype=torch.int64), Context(cu_seqlens=bounds))


def test_a_compiled_graph_asserts_the_bounds_of_packed_sequences(toy: Registry) -> None:
    compiled = torch.compile(packed(toy, True), backend="eager", fullgraph=True)
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    assert compiled(tokens, Context(cu_seqlens=torch.tensor([0, 0, 6]))).y.shape[1] == 6
    with pytest.raises(RuntimeError, match="must rise from 0 to the 6 tokens"):
        compiled(tokens, Context(cu_seqlens=torch.tensor([0, 7, 6])))


def test_the_longest_of_packed_sequences_counts_against_the_longest_that_is_accepted(toy: Registry) -> None:
    model = compose({"mixer": "average", "dim": 16}, plugins=toy)
    model.capabilities = replace(model.capabilities, max_len=4)
    text = torch.zeros(1, 6, dtype=torch.int64)
    assert model(text, Context(cu_seqlens=torch.tensor([0, 4, 6]))).y.shape[1] == 6
    for ctx, longest in ((Context(cu_seqlens=torch.tensor([0, 5, 6])), 5), (Context(), 6)):
        with pytest.raises(UnsupportedContext, match=f"{longest} tokens are more than the 4 that"):
            model(text, ctx)


@pytest.mark.parametrize(("size", "words"), [({"batch": -1}, "-1 rows"), ({"batch": 1, "capacity": -2}, "room for -2")])
def test_a_state_of_less_than_nothing_is_refused(toy: Registry, size: dict[str, int], words: str) -> None:
    model = compose({"mixer": "average", "dim": 16}, plugins=toy)
    with pytest.raises(StateError, match=words):
        model.init_state(**size)


def test_a_state_without_rows_or_room_is_one(toy: Registry) -> None:
    model = compose({"mixer": "average", "dim": 16}, plugins=toy)
    out = model(torch.zeros(0, 3, dtype=torch.int64), state=model.init_state(0, capacity=0))
    assert out.y.shape[:2] == (0, 3) and out.state is not None


def test_a_state_of_another_batch_is_refused(toy: Registry) -> None:
    model = compose({"mixer": "average", "dim": 16}, plugins=toy)
    with pytest.raises(UnsupportedContext, match="the state is of 3 sequences, the inputs are of 2"):
        model(torch.zeros(2, 6, dtype=torch.int64), state=model.init_state(3))


OTHERS: dict[str, dict[str, Any]] = {
    "fewer layers": {"mixer": "average", "layers": 1},
    "more layers": {"mixer": "average", "layers": 3},
    "a memory beside": {"mixer": "average", "memory": "notebook", "layers": 2},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_model_is_refused(toy: Registry, other: str) -> None:
    model, foreign = (compose({"dim": 16, **data}, plugins=toy) for data in ({"mixer": "average"}, OTHERS[other]))
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    for one, state in ((model, foreign.init_state(2)), (foreign, model.init_state(2)), (model, State())):
        with pytest.raises(StateError, match=r"not one of this model's.*\n.*what its init_state or an earlier call"):
            one(tokens, state=state)
    assert model(tokens, state=model(tokens, state=model.init_state(2)).state).state is not None


def test_an_error_of_a_layer_is_not_taken_for_a_foreign_state(toy: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compose({"mixer": "average", "dim": 16}, plugins=toy)
    monkeypatch.setattr(model.body, "forward", lambda *_: {}["h"])
    with pytest.raises(KeyError, match="h"):
        model(torch.zeros(2, 6, dtype=torch.int64), state=model.init_state(2))


def test_a_model_that_does_not_stream_takes_no_state(toy: Registry) -> None:
    model = compose({"mixer": "whole", "dim": 16, "causal": False, **VECTORS}, plugins=toy)
    with pytest.raises(UnsupportedContext, match="does not stream"):
        model(torch.zeros(2, 6, 3), state=State())
