"""State: every operation acts on each leaf's own axes, exactly or not at all."""

from __future__ import annotations

import pytest
import torch

from altx.errors import StateError
from altx.state import Leaf, State


def make(batch: int = 3, slots: int = 5) -> State:
    """A state with every sort of leaf: rows first, rows second, shared, growing, and a child."""
    child = State(
        {"kv": torch.arange(batch * slots * 2.0).reshape(batch, slots, 2)},
        {"kv": Leaf(seq_dim=1, kind="kv")},
        seen=torch.tensor([5, 4, 3]),
    )
    leaves = {
        "first": torch.arange(batch * 2.0).reshape(batch, 2),
        "second": torch.arange(4 * batch * 1.0).reshape(4, batch),
        "shared": torch.ones(7),
    }
    spec = {"first": Leaf(fp32=True), "second": Leaf(batch_dim=1), "shared": Leaf(batch_dim=None)}
    return State(leaves, spec, {"child": child}, torch.arange(batch))


def test_leaves_and_spec_must_agree() -> None:
    with pytest.raises(StateError, match="do not match"):
        State({"a": torch.zeros(1)}, {})


def test_select_uses_each_leafs_own_batch_axis() -> None:
    state, index = make(), torch.tensor([2, 0, 0])
    picked = state.select(index)
    assert torch.equal(picked["first"], state["first"][[2, 0, 0]])
    assert torch.equal(picked["second"], state["second"][:, [2, 0, 0]])
    assert picked["shared"] is state["shared"]
    assert torch.equal(picked.children["child"]["kv"], state.children["child"]["kv"][[2, 0, 0]])
    assert picked.seen is not None and picked.seen.tolist() == [2, 0, 0]


def test_repeat_keeps_copies_of_a_row_together() -> None:
    state = make().repeat(2)
    assert state.seen is not None and state.seen.tolist() == [0, 0, 1, 1, 2, 2]
    assert state["second"].shape == (4, 6)


def test_where_chooses_rows() -> None:
    old, new = make(), make().map(lambda t, leaf: t + 100)
    both = new.where(torch.tensor([True, False, True]), old)
    assert torch.equal(both["second"][:, 1], old["second"][:, 1])
    assert torch.equal(both["second"][:, 0], new["second"][:, 0])
    assert both.seen is not None and both.seen.tolist() == [100, 1, 102]


def test_where_refuses_states_of_unequal_size() -> None:
    with pytest.raises(StateError, match="'kv'"):
        make(slots=6).where(torch.tensor([True, False, True]), make())


def test_crop_clears_what_it_forgets_in_every_row() -> None:
    kv = make().children["child"].crop(2)
    assert kv.seen is not None and kv.seen.tolist() == [3, 2, 1]
    assert [int((row != 0).any(-1).sum()) for row in kv["kv"]] == [3, 2, 1]


def test_crop_refuses_a_leaf_that_cannot_forget() -> None:
    with pytest.raises(StateError, match=r"'first' \(recurrent\) cannot drop"):
        make().crop(1)
    assert make().crop(0)["first"].shape == (3, 2)


def test_crop_refuses_what_makes_no_sense() -> None:
    with pytest.raises(StateError, match="cannot drop -1"):
        make().crop(-1)
    with pytest.raises(StateError, match="counts no tokens"):
        State({"kv": torch.ones(1, 3)}, {"kv": Leaf(seq_dim=1)}).crop(1)


def test_flat_and_from_flat_are_inverses() -> None:
    state = make()
    flat = state.flat()
    assert set(flat) == {"first", "second", "shared", "seen", "child.kv", "child.seen"}
    back = make().map(lambda t, leaf: torch.zeros_like(t)).from_flat(flat)
    assert all(torch.equal(back.flat()[name], tensor) for name, tensor in flat.items())
    with pytest.raises(StateError, match=r"child\.kv"):
        state.from_flat({name: t for name, t in flat.items() if name != "child.kv"})


def test_casting_keeps_fp32_leaves_and_counters() -> None:
    state = make().to(dtype=torch.bfloat16)
    assert state["first"].dtype == torch.float32
    assert state["second"].dtype == torch.bfloat16
    assert state.seen is not None and state.seen.dtype == torch.int64


def test_bytes_counts_children() -> None:
    assert make().bytes() == 4 * (6 + 12 + 7 + 30)


def test_replace_refuses_unknown_leaves() -> None:
    with pytest.raises(StateError, match="no leaf named thrid"):
        make().replace(thrid=torch.zeros(1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_state_of_zeros_takes_after_a_parameter_and_keeps_what_accumulates_precise(dtype: torch.dtype | None) -> None:
    spec = {"sum": Leaf(fp32=True), "past": Leaf(kind="conv"), "open": Leaf(kind="counter")}
    state = State.zeros(
        3, {"sum": (2, 5), "past": (4,), "open": ()}, spec, torch.ones(1).to(torch.float16), dtype=dtype
    )
    assert {name: (*leaf.shape,) for name, leaf in state.leaves.items()} == {
        "sum": (3, 2, 5),
        "past": (3, 4),
        "open": (3,),
    }
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = {"sum": precise, "past": dtype or torch.float16, "open": torch.int64}
    assert {name: leaf.dtype for name, leaf in state.leaves.items()} == kinds
    assert (
        state.seen is not None and state.seen.tolist() == [0, 0, 0] and not any(v.any() for v in state.flat().values())
    )
    assert State.zeros(1, {"past": (4,)}, {"past": Leaf()}, torch.ones(1), "meta")["past"].is_meta
