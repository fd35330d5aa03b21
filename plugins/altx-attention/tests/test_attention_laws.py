"""A sequence may be cut, padded, packed, forked and rolled back anywhere without changing what comes out."""

from __future__ import annotations

import itertools

import pytest
import torch
from altx_attention.attention import Attention, build
from altx_attention.config import AttentionConfig
from torch import Tensor

from altx.context import Context
from altx.errors import StateError, UnsupportedContext
from altx.layer import FRESH, Output
from altx.spec import BuildContext
from altx.state import State

DIM, LENGTH = 16, 12
CUTS = {
    "whole": [0, 12],
    "chunks": [0, 5, 9, 12],
    "steps": list(range(13)),
    "with empty calls": [0, 0, 7, 7, 8, 12, 12],
}
SETTINGS = {
    "full": {},
    "grouped": {"heads": 8, "kv_heads": 2, "bias": True},
    "window 4": {"window": 4, "bias": True},
    "window 1": {"window": 1},
    "window beyond the sequence": {"window": 30, "kv_heads": 1},
    "no positions": {"rotary": False},
    "partly rotated, capped, scaled": {"rotary_fraction": 0.5, "softcap": 2.0, "scale": 0.7, "kv_heads": 2},
    "sinks": {"sinks": True, "bias": True, "rotary": False},
    "sinks in a window": {"sinks": True, "window": 5, "kv_heads": 1},
    "normed heads, gated": {"heads": 8, "kv_heads": 4, "qk_norm": "head", "gate": True, "bias": True},
    "normed width, windowed, capped": {"qk_norm": "width", "window": 3, "softcap": 1.5, "kv_heads": 2},
}
exactly = dict(atol=1e-10, rtol=1e-10)


def make(**settings: object) -> Attention:
    torch.manual_seed(0)
    layer = build(AttentionConfig(**settings), BuildContext(dim=DIM)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return layer


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def layer(request: pytest.FixtureRequest) -> Attention:
    return make(**request.param)


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def feed(layer: Attention, x: Tensor, cuts: list[int], ctx: Context = FRESH, state: State | None = None) -> Output:
    """Run x in pieces through the state."""
    state, pieces = state or layer.init_state(len(x)), []
    for start, stop in itertools.pairwise(cuts):
        out = layer(x[:, start:stop], ctx.slice(start, stop), state)
        assert out.state is not None
        state, pieces = out.state, [*pieces, out.y]
    return Output(torch.cat(pieces, 1), state)


def assert_same_state(a: State, b: State) -> None:
    """Equal, but for the spare room of a growing cache."""
    for name, value in a.flat().items():
        other = b.flat()[name]
        if value.dim() > 1:
            slots = min(value.shape[1], other.shape[1])
            assert not value[:, slots:].any() and not other[:, slots:].any()
            value, other = value[:, :slots], other[:, :slots]
        torch.testing.assert_close(value, other, **exactly)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@torch.no_grad()
def test_any_cut_gives_the_same_outputs_and_state(layer: Attention, cuts: list[int]) -> None:
    x = tokens()
    cut = feed(layer, x, cuts)
    torch.testing.assert_close(cut.y, layer(x).y, **exactly)
    assert_same_state(cut.state, feed(layer, x, CUTS["steps"]).state)
    assert cut.state.seen.tolist() == [LENGTH] * 3


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@torch.no_grad()
def test_padding_in_any_pattern_changes_nothing_however_it_is_cut(layer: Attention, cuts: list[int]) -> None:
    x, mask = tokens(8), torch.rand(8, LENGTH) < 0.6
    mask[5], mask[6], mask[7] = False, torch.arange(LENGTH) >= 5, torch.arange(LENGTH) < 5
    whole, cut = layer(x, Context(mask=mask)), feed(layer, x, cuts, Context(mask=mask))
    assert whole.y.isfinite().all() and cut.y.isfinite().all()
    assert cut.state.seen.tolist() == mask.sum(1).tolist()
    for b in range(8):
        alone = feed(layer, x[b : b + 1, mask[b]], [0, int(mask[b].sum())])
        torch.testing.assert_close(whole.y[b, mask[b]], alone.y[0], **exactly)
        torch.testing.assert_close(cut.y[b, mask[b]], alone.y[0], **exactly)
        assert_same_state(cut.state.select(torch.tensor([b])), alone.state)


@torch.no_grad()
def test_what_a_masked_token_holds_does_not_matter(layer: Attention) -> None:
    x, mask = tokens(), torch.rand(3, LENGTH) < 0.6
    spoilt = x.masked_fill(~mask[..., None], float("nan"))
    for run in (lambda x: layer(x, Context(mask=mask)), lambda x: feed(layer, x, [0, 5, 12], Context(mask=mask))):
        torch.testing.assert_close(run(spoilt).y[mask], run(x).y[mask], **exactly)


@torch.no_grad()
def test_a_fully_masked_call_leaves_the_state_exactly_as_it_was(layer: Attention) -> None:
    for start in (layer.init_state(3), feed(layer, tokens(), [0, 5, 12]).state):
        out = layer(tokens(), Context(mask=torch.zeros(3, LENGTH, dtype=torch.bool)), start)
        assert out.y.isfinite().all()
        assert all(torch.equal(value, start.flat()[name]) for name, value in out.state.flat().items())


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@torch.no_grad()
def test_a_reset_starts_afresh_within_a_row(layer: Attention, cuts: list[int]) -> None:
    x, mask, reset = tokens(2), torch.ones(2, LENGTH, dtype=torch.bool), torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[1, [0, 3, 7]] = False
    reset[:, [3, 8]] = True  # the one of row 1 at 3 is masked, and so starts nothing
    ctx = Context(mask=mask, reset=reset)
    for out in (layer(x, ctx), feed(layer, x, cuts, ctx)):
        for b, starts in ((0, [0, 3, 8, LENGTH]), (1, [0, 8, LENGTH])):
            for start, stop in itertools.pairwise(starts):
                real = mask[b, start:stop]
                fresh = layer(x[b : b + 1, start:stop][:, real]).y[0]
                torch.testing.assert_close(out.y[b, start:stop][real], fresh, **exactly)


@torch.no_grad()
def test_a_reset_is_remembered_by_calls_that_have_none(layer: Attention) -> None:
    x, reset = tokens(2), torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 4] = True
    state = layer(x[:, :6], Context(reset=reset), layer.init_state(2)).state
    y = feed(layer, x[:, 6:], list(range(7)), state=state).y
    torch.testing.assert_close(y[0], layer(x[:1, 4:]).y[0, 2:], **exactly)
    torch.testing.assert_close(y[1], layer(x[1:]).y[0, 6:], **exactly)


@pytest.mark.parametrize("capacity", [0, 4, LENGTH, 20])
@torch.no_grad()
def test_a_cache_may_be_reserved_and_outgrown(capacity: int) -> None:
    layer, x = make(), tokens()
    out = feed(layer, x, CUTS["chunks"], state=layer.init_state(3, capacity=capacity))
    torch.testing.assert_close(out.y, layer(x).y, **exactly)
    assert out.state["k"].shape[1] == max(capacity, LENGTH)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_donated_state_gives_the_same_and_is_written_in_place(masked: bool) -> None:
    layer, x = make(kv_heads=2), tokens()
    ctx = Context(mask=torch.rand(3, LENGTH) < 0.6 if masked else None)
    start = layer.init_state(3, capacity=LENGTH)
    out = feed(layer, x, CUTS["chunks"], ctx.replace(donate_state=True), start)
    kept = feed(layer, x, CUTS["chunks"], ctx, layer.init_state(3, capacity=LENGTH))
    assert out.state["k"].data_ptr() == start["k"].data_ptr()
    torch.testing.assert_close(out.y, kept.y, **exactly)
    assert_same_state(out.state, kept.state)


@torch.no_grad()
def test_without_donation_no_input_is_written_to(layer: Attention) -> None:
    x, mask = tokens(), torch.rand(3, LENGTH) < 0.6
    state = feed(layer, x, [0, 6], state=layer.init_state(3, capacity=40)).state
    before, kept = state.clone(), x.clone()
    layer(x, Context(mask=mask), state)
    layer(x, FRESH, state)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before.flat()[name]) for name, value in state.flat().items())


@torch.no_grad()
def test_tokens_can_be_cropped_and_the_sequence_continued_exactly() -> None:
    layer, x = make(), tokens()
    mask, reset = torch.rand(3, LENGTH) < 0.7, torch.rand(3, LENGTH) < 0.3
    mask[:, :4] = True
    state = feed(layer, x, [0, 5, 12], Context(mask=mask, reset=reset)).state.crop(3)
    more = tokens(3, 4)
    out = feed(layer, more, [0, 1, 4], state=state)
    for b in range(3):
        kept = mask[b].nonzero().flatten()[:-3]
        row, starts = torch.cat([x[b, kept], more[b]])[None], torch.cat([reset[b, kept], torch.zeros(4).bool()])[None]
        torch.testing.assert_close(out.y[b], layer(row, Context(reset=starts)).y[0, -4:], **exactly)


@torch.no_grad()
def test_a_window_refuses_to_be_cropped() -> None:
    layer = make(window=4)
    state = feed(layer, tokens(), [0, LENGTH]).state
    assert state["k"].shape[1] == 3
    with pytest.raises(StateError, match="cannot drop its last 3 tokens"):
        state.crop(3)


@pytest.mark.parametrize("settings", [{}, {"sinks": True}, {"softcap": 2.0}], ids=str)
@torch.no_grad()
def test_a_sequence_of_many_windows_is_what_its_pieces_are(settings: dict) -> None:
    """So many that they are cut into short sequences; masked, reset and continued."""
    layer, x = make(window=5, kv_heads=2, **settings), tokens(2, 300)
    mask, reset = torch.rand(2, 300) < 0.8, torch.rand(2, 300) < 0.02
    ctx = Context(mask=mask, reset=reset)
    steps = feed(layer, x, list(range(301)), ctx)
    for out in (layer(x, ctx), feed(layer, x, [0, 149, 150, 300], ctx)):
        torch.testing.assert_close(out.y[mask], steps.y[mask], **exactly)
    mask[0, 150] = True
    both, changed = Context(causal=False, mask=mask), x.clone()
    changed[0, 150] += 1
    near = (layer(changed, both).y - layer(x, both).y)[0].abs().amax(-1)[mask[0]] > 1e-9
    assert near.sum() == 9  # four tokens on each side, and itself


@torch.no_grad()
def test_rows_of_a_state_can_be_reordered_and_repeated(layer: Attention) -> None:
    x, mask, beams = tokens(), torch.rand(3, LENGTH) < 0.6, torch.tensor([2, 0, 0])
    mask[:, 7:] = True
    state = feed(layer, x[:, :7], [0, 7], Context(mask=mask).slice(0, 7)).state.select(beams)
    y = feed(layer, x[beams, 7:], [0, 1, 5], state=state).y
    torch.testing.assert_close(y, layer(x[beams], Context(mask=mask[beams])).y[:, 7:], **exactly)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@torch.no_grad()
def test_only_a_bidirectional_call_sees_later_tokens(layer: Attention, causal: bool) -> None:
    x = tokens()
    other = x.clone()
    other[:, 6] += 1
    changed = (layer(x, Context(causal=causal)).y - layer(other, Context(causal=causal)).y).abs().amax((0, 2)) > 1e-9
    reach = min(layer.window or LENGTH, LENGTH) - 1
    expected = [(t >= 6 or not causal) and abs(t - 6) <= reach for t in range(LENGTH)]
    assert changed.tolist() == expected


def test_looking_both_ways_cannot_continue_a_state(layer: Attention) -> None:
    with pytest.raises(UnsupportedContext, match="cannot continue a state"):
        layer(tokens(), Context(causal=False), layer.init_state(3))


@torch.no_grad()
def test_no_tokens_are_legal_and_change_nothing(layer: Attention) -> None:
    state = layer.init_state(3)
    out = layer(tokens(3, 0), FRESH, state)
    assert out.y.shape == (3, 0, DIM) and out.state is state
    assert layer(tokens(3, 0)).y.shape == (3, 0, DIM)
    assert layer(tokens(0)).y.shape == (0, LENGTH, DIM)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_through_mask_and_state_are_right(window: int | None) -> None:
    layer, mask = make(heads=2, kv_heads=1, head_dim=4, window=window), torch.rand(2, 5) < 0.7
    mask[:, 0] = True

    def run(x: Tensor) -> Tensor:
        return feed(layer, x, [0, 3, 5], Context(mask=mask)).y[mask]

    for function in (run, lambda x: layer(x).y):
        assert torch.autograd.gradcheck(function, tokens(2, 5).requires_grad_(), fast_mode=True)


def test_every_parameter_gets_a_gradient(layer: Attention) -> None:
    if layer.window == 1:
        pytest.skip("where a token sees itself alone, nothing depends on its query and key")
    layer(tokens()).y.square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in layer.parameters())


@torch.no_grad()
def test_a_low_precision_cache_serves_a_float32_layer(layer: Attention) -> None:
    layer, x = layer.float(), tokens().float()
    for dtype in (torch.bfloat16, torch.float32):
        out = feed(layer, x, CUTS["chunks"], state=layer.init_state(3, dtype=dtype))
        assert out.y.dtype == torch.float32 and out.state["k"].dtype == dtype
    torch.testing.assert_close(out.y, layer(x).y, atol=1e-4, rtol=1e-4)
