"""The dispatch plan and `Routed`: one order for grouped matmul and for stateful targets."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.capabilities import RouterCapabilities, meet
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


def test_capabilities_of_a_whole_are_the_meet_of_its_parts() -> None:
    whole = meet([MovingAverage.capabilities, SwiGLU.capabilities])
    assert (whole.growth, whole.rollback, whole.bidirectional, whole.packing) == ("constant", "snapshot", False, False)
