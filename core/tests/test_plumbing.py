"""Containers and adapters hand on everything a layer is told: positions, resets, shared values, exports, losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toy_plugin import Notebook

from altx.adapters import Bidirectional, PadToMultiple, PrefixReplay, Unpack
from altx.attach import ControllerAttach
from altx.block import Residual, Stack
from altx.capabilities import Capabilities
from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.layout import reverse
from altx.state import State
from altx.testing.case import difference, state_difference
from altx.testing.partners import MovingAverage

DIM = 4


class Probe(Layer):
    """Running sums, from each reset on, of x times 1 + position + shared["hint"]; needs a length of `multiple`."""

    def __init__(self, multiple: int = 1, **promises: object) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.capabilities = replace(Capabilities(streaming="none", len_multiple=multiple), **promises)  # type: ignore[arg-type]

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        assert x.shape[1] % self.capabilities.len_multiple == 0
        positions = ctx.ranks(x) if ctx.positions is None else ctx.positions
        value = self.scale * x * (1.0 + positions[..., None])
        if "hint" in ctx.shared:
            value = value + ctx.shared["hint"]
        real = torch.ones(x.shape[:2], dtype=torch.bool) if ctx.mask is None else ctx.mask
        total, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            kept = total if ctx.reset is None else torch.where((ctx.reset & real)[:, t, None], 0, total)
            total = torch.where(real[:, t, None], kept + value[:, t], total)
            outputs.append(total)
        y = torch.stack(outputs, 1) if outputs else x
        sums = value[real].sum()
        return Output(y, None, {"sum": sums}, {"count": real.sum()}, {"seen": value})


@pytest.fixture
def told() -> tuple[Tensor, Context]:
    """A batch and a context with everything in it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, DIM, generator=generator, dtype=torch.float64)
    hint = torch.randn(2, 6, DIM, generator=generator, dtype=torch.float64)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 2] = reset[1, 4] = True
    positions = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    return x, Context(positions=positions, reset=reset, shared={"hint": hint})


def same(a: Output, b: Output, scope: str = "inner.") -> None:
    assert difference(a.y, b.y) < 1e-12
    assert difference(a.exports["seen"], b.exports["seen"]) < 1e-12
    assert {name.removeprefix(scope) for name in a.losses} == set(b.losses)
    assert {name.removeprefix(scope) for name in a.metrics} == set(b.metrics)


def test_padding_hands_on_everything(told: tuple[Tensor, Context]) -> None:
    x, ctx = told
    same(PadToMultiple(Probe(4).double())(x, ctx), Probe().double()(x, ctx))


def test_replay_keeps_positions_resets_and_exports(told: tuple[Tensor, Context]) -> None:
    x, ctx = told
    ctx = ctx.replace(shared={})
    layer, plain = PrefixReplay(Probe().double(), DIM), Probe().double()(x, ctx)
    state, outputs, exports = layer.init_state(2), [], []
    for start, stop in ((0, 1), (1, 3), (3, 6)):
        out = layer(x[:, start:stop], ctx.slice(start, stop), state)
        state = out.state
        outputs.append(out.y)
        exports.append(out.exports["seen"])
    assert difference(torch.cat(outputs, 1), plain.y) < 1e-12
    assert difference(torch.cat(exports, 1), plain.exports["seen"]) < 1e-12


def test_replay_counts_default_positions_over_real_tokens(told: tuple[Tensor, Context]) -> None:
    x, _ = told
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    layer = PrefixReplay(Probe().double(), DIM)
    y = layer(x, Context(mask=mask), layer.init_state(2)).y
    for row in range(2):
        alone = Probe().double()(x[row : row + 1, mask[row]]).y
        assert difference(y[row : row + 1, mask[row]], alone) < 1e-12


def test_unpacking_hands_on_everything(told: tuple[Tensor, Context]) -> None:
    x, ctx = told
    bounds = torch.tensor([0, 2, 2, 6])
    packed = Context(
        positions=ctx.positions[:1], reset=ctx.reset[1:], shared={"hint": ctx.shared["hint"][:1]}, cu_seqlens=bounds
    )  # fmt: skip
    out = Unpack(Probe().double())(x[:1], packed)
    for start, stop in ((0, 2), (2, 6)):
        alone = Probe().double()(x[:1, start:stop], packed.replace(cu_seqlens=None).slice(start, stop))
        assert difference(out.y[:, start:stop], alone.y) < 1e-12
        assert difference(out.exports["seen"][:, start:stop], alone.exports["seen"]) < 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_each_direction_has_its_own_weights_and_a_mirrored_context(told: tuple[Tensor, Context], masked: bool) -> None:
    x, ctx = told
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool) if masked else None
    ctx = ctx.replace(reset=None, mask=mask, causal=False)
    there, back = Probe().double(), Probe().double()
    back.scale.data.fill_(3.0)
    out = Bidirectional(there, back)(x, ctx)
    turned = ctx.replace(
        positions=reverse(ctx.positions, mask), shared={"hint": reverse(ctx.shared["hint"], mask)}, causal=True
    )  # fmt: skip
    wanted = there(x, ctx).y + reverse(back(reverse(x, mask), turned).y, mask)
    real = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask
    assert difference(out.y[real], wanted[real]) < 1e-12
    assert set(out.losses) == {"forward_layer.sum", "backward_layer.sum"}
    assert set(out.metrics) == {"forward_layer.count", "backward_layer.count"}


def test_a_stack_passes_exports_to_later_layers_beside_what_it_was_given(told: tuple[Tensor, Context]) -> None:
    class Reader(Layer):
        capabilities = Capabilities()

        def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
            return Output(x + ctx.shared["seen"] + ctx.shared["hint"])

    x, ctx = told
    stack = Stack([Residual(Probe().double(), DIM, "none"), Residual(Reader(), DIM, "none")])
    out, first = stack(x, ctx), Probe().double()(x, ctx)
    middle = x + first.y
    assert difference(out.y, middle + middle + first.exports["seen"] + ctx.shared["hint"]) < 1e-12
    assert set(out.exports) == {"seen"}
    assert set(out.losses) == {"layers.0.body.sum"}


@pytest.mark.parametrize("includes", [frozenset(), frozenset({"norm"}), frozenset({"residual"})])
def test_a_body_is_given_no_norm_and_no_residual_that_it_includes(includes: frozenset[str]) -> None:
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    probe = Probe(includes=includes).double()
    y = Residual(probe, DIM).double()(x).y
    inner = x if "norm" in includes else torch.nn.functional.rms_norm(x, (DIM,), eps=1e-5)
    wanted = probe(inner).y + (0 if "residual" in includes else x)
    assert difference(y, wanted) < 1e-12


def test_a_controllers_losses_weigh_real_tokens_alike() -> None:
    layer = ControllerAttach(MovingAverage(DIM), Notebook(DIM), DIM).double()
    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False]])
    spread = torch.randn(1, 5, DIM, dtype=torch.float64)
    spread[mask] = x[0]
    assert difference(layer(spread, Context(mask=mask)).losses["memory.size"], layer(x).losses["memory.size"]) < 1e-12


def test_a_reset_at_padding_is_none_of_the_controllers_business() -> None:
    layer = ControllerAttach(MovingAverage(DIM), Notebook(DIM), DIM).double()
    layer.initial_read.data.fill_(0.7)
    x = torch.randn(1, 4, DIM, dtype=torch.float64)
    mask, reset = torch.tensor([[True, True, False, True]]), torch.tensor([[False, False, True, False]])
    with_reset = layer(x, Context(mask=mask, reset=reset), layer.init_state(1, dtype=torch.float64))
    without = layer(x, Context(mask=mask), layer.init_state(1, dtype=torch.float64))
    assert state_difference(with_reset.state, without.state) == 0


def test_a_context_is_cut_and_masked_in_every_field(told: tuple[Tensor, Context]) -> None:
    _, ctx = told
    ctx = ctx.replace(mask=torch.rand(2, 6) > 0.5)
    piece = ctx.slice(1, 4)
    for name in ("mask", "positions", "reset"):
        assert torch.equal(getattr(piece, name), getattr(ctx, name)[:, 1:4])
    assert torch.equal(piece.shared["hint"], ctx.shared["hint"][:, 1:4])
    other = torch.rand(2, 6) > 0.5
    assert torch.equal(ctx.and_mask(other).mask, ctx.mask & other)
    assert torch.equal(FRESH.and_mask(other).mask, other)


def test_a_clone_shares_no_storage() -> None:
    state = MovingAverage(DIM).init_state(2)
    assert state.clone()["h"].data_ptr() != state["h"].data_ptr()


def test_every_packed_sequence_is_counted_by_itself() -> None:
    x, seen = torch.zeros(1, 6, DIM), torch.tensor([1, 0, 7])
    packed = Context(cu_seqlens=torch.tensor([0, 4, 4, 6]))
    assert advanced(seen, x, packed).tolist() == [5, 0, 9]
    assert advanced(None, x, packed).tolist() == [4, 0, 2]
    masked = packed.replace(mask=torch.tensor([[True, False, False, True, True, False]]))
    assert advanced(seen, x, masked).tolist() == [3, 0, 8]
