"""The dispatch plan and `Routed`: one order for grouped matmul and for stateful targets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from altx.capabilities import Capabilities, RouterCapabilities, meet
from altx.context import Context
from altx.dispatch import plan
from altx.feed_forward import SwiGLU, SwiGLUBank
from altx.layer import FRESH
from altx.routed import Routed
from altx.router import Route, Router, Targets
from altx.state import State
from altx.testing.case import difference, state_difference
from altx.testing.partners import MovingAverage


class FixedRouter(Router):
    """Token choice with given indices (B, T, K); weights are a parameter-free function of x."""

    capabilities = RouterCapabilities(bidirectional=True)

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index = index

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        batch, length = x.shape[:2]
        start = int(state["at"]) if state else 0
        index = self.index[:, start : start + length]
        if ctx.mask is not None:
            index = torch.where(ctx.mask[..., None], index, -1)
        k = index.shape[-1]
        token = torch.arange(batch * length)[:, None].expand(-1, k).reshape(-1)
        weight = (1 + x[..., :k].square()).reshape(-1)
        return Route(targets.n, token, index.reshape(-1), weight)


def test_plan_is_sorted_by_target_then_row_then_time_with_void_pairs_last() -> None:
    token = torch.tensor([5, 0, 3, 1, 4, 2])
    target = torch.tensor([1, 0, -1, 1, 0, 1])
    p = plan(token, target, torch.arange(6.0), 3)
    assert p.token.tolist() == [0, 4, 1, 2, 5, 3]
    assert p.offsets.tolist() == [0, 2, 5, 5]
    assert p.valid.tolist() == [True] * 5 + [False]
    assert p.weight.tolist() == [1, 4, 3, 5, 0, 2]


def test_combine_is_the_weighted_sum_and_ignores_void_rows() -> None:
    p = plan(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, -1]), torch.tensor([2.0, 3, 5, 7]), 2)
    y = torch.tensor([[1.0], [10], [100], [float("nan")]])
    assert p.combine(y, 1, 2)[0, :, 0].tolist() == [2 + 30, 500]


def test_grouped_bank_equals_a_loop_over_experts() -> None:
    torch.manual_seed(0)
    bank = SwiGLUBank(3, 8, 12).double()
    experts = [SwiGLU(8, 12).double() for _ in range(3)]
    for i, expert in enumerate(experts):
        for name, weight in (("gate", bank.gate), ("up", bank.up), ("down", bank.down)):
            getattr(expert, name).weight.data = weight[i].T.detach().clone()
    router = FixedRouter(torch.randint(-1, 3, (2, 9, 2)))
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.rand(2, 9) > 0.3
    for ctx in (FRESH, FRESH.replace(mask=mask)):
        grouped, looped = Routed(router, bank)(x, ctx).y, Routed(router, experts)(x, ctx).y
        real = mask if ctx.mask is not None else torch.ones_like(mask)
        assert difference(grouped[real], looped[real]) < 1e-12


def test_a_targets_state_holds_on_tokens_it_was_not_chosen_for() -> None:
    """Each target runs as if its own tokens were the whole sequence."""
    torch.manual_seed(0)
    index = torch.randint(-1, 2, (2, 10, 1))
    mixers = [MovingAverage(4).double() for _ in range(2)]
    layer = Routed(FixedRouter(index), mixers, "mixers")
    x = torch.randn(2, 10, 4, dtype=torch.float64)
    state = layer.init_state(2, dtype=torch.float64)
    out = layer(x, FRESH, State(state.leaves, state.spec, state.children, state.seen))
    assert out.state is not None
    for row in range(2):
        for target, mixer in enumerate(mixers):
            own = x[row : row + 1, index[row, :, 0] == target]
            alone = mixer(own, FRESH, mixer.init_state(1, dtype=torch.float64))
            held = out.state.children["targets"].children[str(target)].select(torch.tensor([row]))
            assert state_difference(held, alone.state) < 1e-12
            weight = 1 + own[..., :1].square()
            assert difference(out.y[row : row + 1, index[row, :, 0] == target], alone.y * weight) < 1e-12


def test_a_reset_reaches_a_target_that_was_not_chosen_for_its_token() -> None:
    index = torch.tensor([[[0], [1], [1], [0], [1]]])
    mixers = [MovingAverage(4).double() for _ in range(2)]
    layer = Routed(FixedRouter(index), mixers, "mixers")
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    reset = torch.tensor([[False, False, True, False, False]])
    y = layer(x, FRESH.replace(reset=reset)).y
    fresh = Routed(FixedRouter(index[:, 2:]), mixers, "mixers")(x[:, 2:]).y
    assert difference(y[:, 2:], fresh) < 1e-12


def test_a_reset_is_owed_to_a_target_across_calls() -> None:
    torch.manual_seed(0)
    index = torch.randint(-1, 2, (2, 12, 1))
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    reset, mask = torch.rand(2, 12) < 0.3, torch.rand(2, 12) < 0.8
    mixers = [MovingAverage(4).double() for _ in range(2)]
    layer = Routed(FixedRouter(index), mixers, "mixers")
    whole = layer(x, Context(reset=reset, mask=mask))
    state, pieces, start = layer.init_state(2, dtype=torch.float64), [], 0
    for length in (1, 3, 0, 2, 1, 5):
        # The router's decisions are fixed by position, so each call is given its own part of them.
        part = Routed(FixedRouter(index[:, start : start + length]), mixers, "mixers")
        out = part(x[:, start : start + length], Context(reset=reset, mask=mask).slice(start, start + length), state)
        state, start = out.state, start + length
        pieces.append(out.y)
    assert difference(torch.cat(pieces, 1)[mask], whole.y[mask]) < 1e-12
    assert torch.equal(state.seen, mask.sum(1))
    for row in range(2):
        for target, mixer in enumerate(mixers):
            own = (index[row, :, 0] == target) & mask[row]
            fresh, flags, owed = [], [], False
            for t in range(12):
                owed = owed or bool(reset[row, t] & mask[row, t])
                if own[t]:
                    fresh.append(x[row, t])
                    flags.append(owed)
                    owed = False
            if fresh:
                alone = mixer(torch.stack(fresh)[None], Context(reset=torch.tensor([flags])))
                weight = 1 + torch.stack(fresh)[None, :, :1].square()
                assert difference(whole.y[row : row + 1, own], alone.y * weight) < 1e-12


def test_what_a_chain_can_do_is_what_each_part_can() -> None:
    base = Capabilities(bidirectional=True, packing=True)
    for name, worse, expected in (
        ("causal", False, False),
        ("bidirectional", False, False),
        ("masked", False, False),
        ("reset", False, False),
        ("packing", False, False),
        ("deterministic", False, False),
        ("compiles", False, False),
        ("cross", True, True),
        ("graph", "required", "required"),
        ("max_len", 7, 7),
        ("len_multiple", 6, 12),
        ("streaming", "none", "none"),
        ("growth", "linear", "linear"),
    ):
        other = replace(base, len_multiple=4) if name == "len_multiple" else base
        for parts in ([other, replace(base, **{name: worse})], [replace(base, **{name: worse}), other]):
            assert getattr(meet(parts), name) == expected, name
    chunked = replace(base, streaming="chunk", split_multiple=4, partial="single")
    strict = replace(base, streaming="chunk", split_multiple=6, partial="none")
    both = meet([chunked, base, strict])
    assert (both.streaming, both.split_multiple, both.partial) == ("chunk", 12, "none")
    crops, keeps = (
        replace(base, growth="linear", rollback="crop"),
        replace(base, growth="constant", rollback="snapshot"),
    )
    assert [meet(p).rollback for p in ([base], [crops, base], [crops, keeps], [keeps])] == [
        "none", "crop", "snapshot", "snapshot",
    ]  # fmt: skip
    assert meet([replace(base, provides=frozenset("a")), replace(base, requires=frozenset("ab"))]).requires == {"b"}


def test_capabilities_of_a_whole_are_the_meet_of_its_parts() -> None:
    whole = meet([MovingAverage.capabilities, SwiGLU.capabilities])
    assert (whole.growth, whole.rollback, whole.bidirectional, whole.packing) == ("constant", "snapshot", False, False)
