"""A router's targets with a state: the tokens of each are laid side by side, which changes nothing but the time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from altx.capabilities import Capabilities, RouterCapabilities
from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.routed import Routed
from altx.router import Route, Router, Targets
from altx.state import Leaf, State
from altx.testing.partners import MovingAverage

DIM, N = 4, 3


class Given(Router):
    """Sends tokens where the test says, with weights that differ."""

    capabilities = RouterCapabilities()

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target  # (B, T, K), -1 for none

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        target = self.target if ctx.mask is None else torch.where(ctx.mask[..., None], self.target, -1)
        token = torch.arange(x.shape[0] * x.shape[1]).repeat_interleave(target.shape[-1])
        return Route(targets.n, token, target.flatten(), torch.linspace(1, 2, token.numel(), dtype=x.dtype))


class Placed(Layer):
    """h_t = h_{t-1} / 2 + x_t * position_t + shared_t, to see that everything moves along."""

    capabilities = Capabilities(growth="constant", rollback="snapshot")

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def init_state(self, batch, *, capacity=None, device=None, dtype=None):
        h = torch.zeros(batch, DIM, dtype=dtype)
        return State({"h": h}, {"h": Leaf()}, seen=torch.zeros(batch, dtype=torch.int64))

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        self.lengths.append(x.shape[1])
        start = state or self.init_state(x.shape[0], dtype=x.dtype)
        place = ctx.ranks(x, start.seen) if ctx.positions is None else ctx.positions
        h, ys = start["h"], []
        for t in range(x.shape[1]):
            before = h if ctx.reset is None else torch.where(ctx.reset[:, t, None], 0, h)
            new = before / 2 + x[:, t] * place[:, t, None]
            new = new + ctx.shared["value"][:, t] if ctx.shared else new
            h = new if ctx.mask is None else torch.where(ctx.mask[:, t, None], new, h)
            ys.append(h)
        return Output(torch.stack(ys, 1), start.replace(h=h, seen=advanced(start.seen, x, ctx)) if state else None)


def setting(batch: int, length: int = 9):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64)
    target = torch.stack([torch.randperm(N, generator=generator)[:2] for _ in range(batch * length)])
    target = torch.where(torch.rand(target.shape, generator=generator) < 0.3, -1, target).view(batch, length, 2)
    mask = torch.rand(batch, length, generator=generator) < 0.8
    reset = torch.rand(batch, length, generator=generator) < 0.2
    return x, target, mask, reset, generator


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "fields", ["", "mask", "reset", "mask reset", "positions shared", "mask reset positions shared"]
)
def test_tokens_side_by_side_are_tokens_under_a_mask(monkeypatch, batch, fields):
    x, target, mask, reset, generator = setting(batch)
    every = {
        "mask": mask,
        "reset": reset,
        "positions": torch.randint(100, mask.shape, generator=generator),
        "shared": {"value": torch.randn(x.shape, generator=generator, dtype=x.dtype)},
    }
    ctx = Context(**{name: every[name] for name in fields.split()})
    layer = Routed(Given(target), [Placed() for _ in range(N)], "mixers")
    results = []
    for masked in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda masked=masked: masked)
            out = layer(x, ctx, layer.init_state(batch, dtype=x.dtype))
            after = layer(x, ctx, out.state)
            results.append((out.y, after.y, out.state, after.state, layer(x, ctx).y))
    real = mask if "mask" in fields else torch.ones_like(mask)
    for ours, theirs in zip(*results, strict=True):
        if isinstance(ours, Tensor):
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-12, atol=1e-12)
        else:
            torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-12, atol=1e-12)
    assert all(max(placed.lengths[:3]) < 9 and set(placed.lengths[3:]) == {9} for placed in layer.layers)


def test_a_target_without_a_token_holds_its_state_and_gets_no_gradient():
    target = torch.zeros(2, 5, 1, dtype=torch.int64)
    layer = Routed(Given(target), [MovingAverage(DIM).double() for _ in range(2)], "mixers")
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    state = layer.init_state(2, dtype=torch.float64)
    out = layer(x, FRESH, state)
    children = out.state.children["targets"].children
    assert not children["1"]["h"].any() and not children["1"].seen.any() and children["0"].seen.tolist() == [5, 5]
    out.y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.layers[1].parameters())


def test_gradients_are_those_of_the_masked_form(monkeypatch):
    x, target, mask, _, _ = setting(3)
    layer = Routed(Given(target), [MovingAverage(DIM).double() for _ in range(N)], "mixers")
    found = []
    for masked in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda masked=masked: masked)
            leaf = x.clone().requires_grad_()
            y = layer(leaf, Context(mask=mask)).y
        grads = torch.autograd.grad(torch.where(mask[..., None], y, 0).square().sum(), [leaf, *layer.parameters()])
        found.append(grads)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
