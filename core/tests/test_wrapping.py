"""Code that knows neither masks nor resets honours both when it is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import pytest
import torch
from torch import Tensor, nn

from altx.capabilities import Capabilities
from altx.context import Context
from altx.errors import StateError
from altx.layer import Layer, StateOptions
from altx.state import Leaf, State
from altx.testing import run
from altx.testing.case import Subject
from altx.wrapping import Wrapped


class Sum(Wrapped):
    """Adds up what came before; a batch of it must be of one length, for it keeps one count for all rows."""

    capabilities = Capabilities(growth="constant", rollback="snapshot")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim)
        self.dim = dim
        self.calls: list[tuple[int, int]] = []

    def init_state(self, batch: int, **options: Unpack[StateOptions]) -> State:
        zero = torch.zeros(1, batch, self.dim, dtype=options.get("dtype"))
        return State({"h": zero}, {"h": Leaf(batch_dim=1)}, seen=torch.zeros(batch, dtype=torch.int64))

    def run(self, x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        assert ctx.mask is None and ctx.reset is None and x.shape[1]
        self.calls.append((x.shape[0], x.shape[1]))
        y = x.cumsum(1) + state["h"][0, :, None]
        return self.out(y), state.replace(h=y[None, :, -1])


class WholeMean(Wrapped):
    """An encoder's: the mean over the whole row, padding too if it came."""

    capabilities = Capabilities(causal=False, bidirectional=True, streaming="none")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def run(self, x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        return self.out(x) + x.mean(1, keepdim=True), state


@pytest.mark.parametrize(("build", "causal"), [(Sum, True), (WholeMean, False)])
def test_every_law_holds_for_what_is_wrapped(build: Callable[[int], Layer], causal: bool) -> None:
    results = run(Subject("wrapped", lambda: build(16), causal=causal))
    assert [f"{r.check}: {r.message}" for r in results if r.status == "failed"] == []
    passed = {r.check for r in results if r.status == "passed"}
    assert passed >= {"padding", "all-masked", "packing", "gradcheck", "compiled"}
    assert not causal or passed >= {"padding-across-calls", "reset", "steps", "select", "seen"}


def test_sequences_of_one_length_run_together() -> None:
    layer, x = Sum(4), torch.randn(4, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    out = layer(x, Context(mask=mask), layer.init_state(4))
    assert sorted(layer.calls) == [(1, 5), (2, 3)]
    assert out.state.seen.tolist() == [5, 3, 3, 0]
    torch.testing.assert_close(out.state["h"][0], torch.where(mask[..., None], x, 0).sum(1))


def test_positions_and_shared_values_follow_their_tokens() -> None:
    class Shifted(Sum):
        def run(self, x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
            assert ctx.positions is not None
            return ctx.shared["v"] + ctx.positions[..., None], state

    mask = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=torch.bool)
    positions, v = torch.arange(6).view(2, 3) * 10, torch.randn(2, 3, 4)
    y = Shifted(4)(torch.randn(2, 3, 4), Context(mask=mask, positions=positions, shared={"v": v})).y
    torch.testing.assert_close(y[mask], (v + positions[..., None])[mask])


def test_states_are_joined_row_by_row_or_refused() -> None:
    def state(rows: int, slots: int) -> State:
        leaves = {"k": torch.randn(2, rows, slots), "all": torch.ones(3)}
        spec = {"k": Leaf(batch_dim=1, seq_dim=2), "all": Leaf(batch_dim=None)}
        return State({}, {}, {"inner": State(leaves, spec, seen=torch.arange(rows))})

    one, two = state(2, 4), state(3, 4)
    both = State.cat([one, two])
    assert both.tokens is not None and both.tokens.tolist() == [0, 1, 0, 1, 2]
    for part, index in ((one, [0, 1]), (two, [2, 3, 4])):
        there = both.select(torch.tensor(index)).flat()
        assert all(torch.equal(there[name], tensor) for name, tensor in part.flat().items())
    with pytest.raises(StateError, match="rows of leaf 'k' differ in shape"):
        State.cat([one, state(1, 5)])
