"""Depths of a stack, token by token: against a loop over rows, tokens and depths, wherever tokens leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from altx.capabilities import Capabilities, RouterCapabilities
from altx.context import Context
from altx.errors import CompositionError
from altx.layer import FRESH, Layer, Output
from altx.recursion import Recursion
from altx.router import Route, Router, Targets
from altx.state import State
from altx.testing.partners import MovingAverage

DIM, DEPTHS, ROWS, LENGTH = 3, 3, 4, 18


class Planned(Router):
    """Each token takes part in as many applications as `ctx.shared` says, and each weighs what it says."""

    def __init__(self, stepwise: bool) -> None:
        super().__init__()
        self.capabilities = RouterCapabilities(bidirectional=True, stepwise=stepwise)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        times = ctx.shared["times"] if ctx.mask is None else ctx.shared["times"].where(ctx.mask, 0)
        target = torch.where(times > targets.depth, targets.depth, -1) if self.capabilities.stepwise else times - 1
        token = torch.arange(target.numel())
        return Route(targets.n, token, target.flatten(), ctx.shared["weight"].flatten().where(target.flatten() >= 0, 0))


def recursion(stepwise: bool) -> Recursion:
    layer = Recursion(Planned(stepwise), MovingAverage(DIM), DEPTHS).double().eval()
    torch.nn.init.normal_(layer.body.decay)
    return layer


def batch(case: str) -> tuple[Tensor, Context]:
    """Tokens and a context in which the rows differ in all that they can differ in."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, LENGTH, DIM, generator=draw, dtype=torch.float64)
    shared = {
        "times": torch.randint(0, DEPTHS + 1, (ROWS, LENGTH), generator=draw),
        "weight": torch.rand(ROWS, LENGTH, generator=draw, dtype=torch.float64),
    }
    if case == "all leave after the first":
        shared["times"] = shared["times"].clamp(min=1, max=1)
    elif case == "none takes part":
        shared["times"] *= 0
    elif case == "some rows have none":
        shared["times"][0], shared["times"][1], shared["times"][2, 1:] = 0, 1, 0
    elif case == "all go through all":
        shared["times"][:] = DEPTHS
    mask = torch.rand(ROWS, LENGTH, generator=draw) < 0.8 if case != "all real" else None
    reset = torch.rand(ROWS, LENGTH, generator=draw) < 0.25 if case != "all real" else None
    if mask is not None:
        mask[-1] = False
        x[~mask] = torch.nan
    return x, Context(mask=mask, reset=reset, shared=shared)


CASES = (
    "all real",
    "mixed",
    "all leave after the first",
    "none takes part",
    "some rows have none",
    "all go through all",
)


def looped(layer: Recursion, x: Tensor, ctx: Context) -> Tensor:
    """y where tokens are real, 0 elsewhere."""
    body, y, a = layer.body, torch.zeros_like(x), torch.sigmoid(layer.body.decay)
    for row in range(ROWS):
        h: dict[int, Tensor] = dict(enumerate(x[row]))
        for depth in range(DEPTHS):
            state, fresh = torch.zeros(DIM, dtype=torch.float64), False
            for t in range(LENGTH):
                if ctx.mask is not None and not ctx.mask[row, t]:
                    continue
                # A document ends for every depth, also for those that have none of its tokens.
                fresh |= ctx.reset is not None and bool(ctx.reset[row, t])
                times, weight = int(ctx.shared["times"][row, t]), ctx.shared["weight"][row, t]
                if times <= depth:
                    continue
                state, fresh = a * torch.where(torch.tensor(fresh), 0, state) + (1 - a) * body.input(h[t]), False
                out = state + h[t]
                if layer.router.capabilities.stepwise:
                    y[row, t], h[t] = y[row, t] + weight * out, h[t] + weight * out
                else:
                    y[row, t], h[t] = weight * out if times == depth + 1 else y[row, t], out
    return y


def real(y: Tensor, ctx: Context) -> Tensor:
    return y if ctx.mask is None else y.where(ctx.mask[..., None], 0)


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop_at_once_in_calls_and_under_a_mask(case: str, stepwise: bool, monkeypatch: Any) -> None:
    layer, (x, ctx) = recursion(stepwise), batch(case)
    wanted = looped(layer, x, ctx)
    for training in (False, True):
        torch.testing.assert_close(real(layer.train(training)(x, ctx).y, ctx), wanted, rtol=1e-12, atol=1e-12)
        for calls in ([1] * LENGTH, [7, 0, 4, 7], [LENGTH]):
            state, ys, start = layer.init_state(ROWS, dtype=torch.float64), [], 0
            for count in calls:
                out = layer(x[:, start : start + count], ctx.slice(start, start + count), state)
                state, start = out.state, start + count
                ys.append(out.y)
            torch.testing.assert_close(real(torch.cat(ys, 1), ctx), wanted, rtol=1e-12, atol=1e-12)
            assert state is not None and state.seen is not None
            assert state.seen.tolist() == ctx.lengths(x).tolist()
    # As graphs that are traced have it: the stack runs on whole rows.
    monkeypatch.setattr("altx.dispatch.countable", lambda x, ctx: False)
    torch.testing.assert_close(real(layer(x, ctx).y, ctx), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_loop_whatever_masked_tokens_hold(case: str, stepwise: bool) -> None:
    layer, (x, ctx) = recursion(stepwise).train(), batch(case)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    body = list(layer.body.parameters())
    found = torch.autograd.grad((real(layer(x, ctx).y, ctx) * weights).sum(), body, allow_unused=True)
    loss = (looped(layer, x, ctx) * weights).sum()
    wanted = torch.autograd.grad(loss, body, allow_unused=True) if loss.requires_grad else (None,) * len(body)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("calls", [[LENGTH], [4, 14], [1] * LENGTH])
def test_after_training_a_depth_without_tokens_is_not_computed(calls: list[int], stepwise: bool) -> None:
    layer, (x, ctx) = recursion(stepwise), batch("all leave after the first")
    ctx, count = ctx.replace(mask=None), 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    x = x.nan_to_num()
    layer.body.register_forward_hook(counted)
    state, start = layer.init_state(ROWS, dtype=torch.float64), 0
    for length in calls:
        state, start = (
            layer(x[:, start : start + length], ctx.slice(start, start + length), state).state,
            start + length,
        )
    assert count == len(calls)
    assert state is not None
    held = state.children["depths"].children
    assert [int(held[str(depth)].tokens.sum()) for depth in range(DEPTHS)] == [x.shape[0] * LENGTH, 0, 0]
    # In training every depth is, so that each step has the same parameters.
    layer.train()(x, ctx)
    assert count == len(calls) + DEPTHS


@pytest.mark.parametrize("case", ["none takes part", "all leave after the first"])
def test_losses_of_the_stack_are_there_whoever_takes_part(case: str) -> None:
    class Costs(MovingAverage):
        def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
            return replace(super().forward(x, ctx, state), losses={"cost": ctx.lengths(x).sum().double()})

    layer, (x, ctx) = Recursion(Planned(False), Costs(DIM), DEPTHS).double(), batch(case)
    for training in (True, False):
        losses = layer.train(training)(x, ctx).losses
        assert {name: int(loss) for name, loss in losses.items()} == {
            "body.cost": int(((ctx.shared["times"] > 0) & ctx.mask).sum())
        }


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_batch_without_rows_or_tokens_is_one(stepwise: bool) -> None:
    layer, (x, ctx) = recursion(stepwise), batch("all real")
    for rows, tokens in ((0, LENGTH), (ROWS, 0), (0, 0)):
        shared = {name: value[:rows, :tokens] for name, value in ctx.shared.items()}
        state = layer.init_state(rows, dtype=torch.float64)
        out = layer(x[:rows, :tokens], Context(shared=shared), state)
        assert out.y.shape == (rows, tokens, DIM) and out.metrics["active"].tolist() == [0] * DEPTHS
        assert float(out.metrics["mean_depth"]) == 0


class Places(Layer):
    """Tells where tokens stand."""

    capabilities = Capabilities(bidirectional=True)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        assert ctx.positions is not None
        return Output(ctx.positions[..., None].expand_as(x).to(x.dtype), state)


def test_tokens_that_are_left_keep_their_positions_across_calls() -> None:
    _, ctx = batch("mixed")
    shared = {**ctx.shared, "weight": torch.ones(ROWS, LENGTH, dtype=torch.float64)}
    ctx, x = ctx.replace(reset=None, shared=shared), torch.zeros(ROWS, LENGTH, DIM, dtype=torch.float64)

    class Both(MovingAverage):
        """With a state, which is what counts the tokens of earlier calls."""

        def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
            return Output(Places()(x, ctx).y, super().forward(x, ctx, state).state)

    layer = Recursion(Planned(False), Both(DIM), DEPTHS).double().eval()
    wanted = ctx.ranks(x)[..., None].expand_as(x).where((ctx.shared["times"] > 0)[..., None], 0).double()
    torch.testing.assert_close(real(layer(x, ctx).y, ctx), real(wanted, ctx))
    state, ys = layer.init_state(ROWS, dtype=torch.float64), []
    for start, stop in ((0, 4), (4, 5), (5, LENGTH)):
        out = layer(x[:, start:stop], ctx.slice(start, stop), state)
        state = out.state
        ys.append(out.y)
    torch.testing.assert_close(real(torch.cat(ys, 1), ctx), real(wanted, ctx))


class Keeps(Layer):
    """Each token finds what it was in the first application, in which nothing comes of it."""

    capabilities = Capabilities(bidirectional=True, streaming="none", shares_kv=True)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        assert ctx.shared_kv
        if ctx.shared_kv.own is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool) if ctx.mask is None else ctx.mask
            order = (~mask).int().argsort(dim=1, stable=True)
            ctx.shared_kv.kept[self] = x.gather(1, order[..., None].expand_as(x))
            return Output(torch.zeros_like(x))
        return Output(ctx.shared_kv.kept[self].gather(1, ctx.shared_kv.own[..., None].expand_as(x)))


def test_with_shared_keys_and_values_each_token_finds_its_own() -> None:
    for case in ("mixed", "some rows have none", "all real"):
        x, ctx = batch(case)
        layer = Recursion(Planned(True), Keeps(), DEPTHS, kv_sharing=True).eval()
        assert layer.init_state(ROWS) is None
        y = real(layer(x, ctx).y, ctx)
        times = (ctx.shared["times"] - 1).clamp(min=0)[..., None]
        wanted = real(x, ctx).where(times > 0, 0) * ctx.shared["weight"][..., None] * times
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def test_what_carries_a_state_of_its_own_cannot_share() -> None:
    with pytest.raises(CompositionError, match="must declare shares_kv"):
        Recursion(Planned(True), MovingAverage(DIM), DEPTHS, kv_sharing=True)
