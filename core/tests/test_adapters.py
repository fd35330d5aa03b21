"""Adapters: what a layer lacks is supplied without changing what it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from altx.adapters import Bidirectional, PadToMultiple, PrefixReplay
from altx.capabilities import Capabilities, split_plan
from altx.context import Context
from altx.layer import FRESH, Layer, Output
from altx.state import State
from altx.testing import run
from altx.testing.case import Subject, difference
from altx.testing.partners import MovingAverage


class BlockMean(Layer):
    """Causal, not streaming, multiples of 4 only: adds to each token the mean of the blocks of 4 before its own."""

    capabilities = Capabilities(streaming="none", masked=False, reset=False, len_multiple=4)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        assert x.shape[1] % 4 == 0
        v = self.value(x)
        blocks = v.unflatten(1, (-1, 4)).sum(2) if x.shape[1] else v
        before = blocks.cumsum(1) - blocks
        count = torch.arange(before.shape[1], dtype=x.dtype)[:, None].clamp(min=1) * 4
        return Output(v + (before / count).repeat_interleave(4, 1) if x.shape[1] else v)


class WholeMean(Layer):
    """An encoder layer for multiples of 3: the mean over real tokens."""

    capabilities = Capabilities(causal=False, bidirectional=True, streaming="none", reset=False, len_multiple=3)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        assert x.shape[1] % 3 == 0
        real = torch.ones(x.shape[:2], dtype=torch.bool) if ctx.mask is None else ctx.mask
        mean = torch.where(real[..., None], x, 0).sum(1, keepdim=True) / real.sum(1)[:, None, None].clamp(min=1)
        return Output(self.value(x) + mean)


def broken(subject: Subject) -> list[str]:
    return [f"{r.check}: {r.message}" for r in run(subject) if r.status == "failed"]


def test_prefix_replay_makes_a_layer_stream_pad_and_crop() -> None:
    assert broken(Subject("replay", lambda: PrefixReplay(PadToMultiple(BlockMean(16)), 16))) == []


def test_padding_to_a_multiple_is_invisible() -> None:
    assert broken(Subject("pad", lambda: PadToMultiple(WholeMean(16)), causal=False)) == []


def test_bidirectional_sees_both_ways_under_any_mask() -> None:
    assert broken(Subject("both", lambda: Bidirectional(MovingAverage(16), MovingAverage(16)), causal=False)) == []
    layer = Bidirectional(MovingAverage(4), MovingAverage(4))
    x = torch.randn(1, 5, 4)
    changed = torch.cat([x[:, :4], x[:, 4:] + 1], 1)
    assert difference(layer(changed).y[:, :1], layer(x).y[:, :1]) > 1e-4


@pytest.mark.parametrize(
    ("offset", "n", "partial", "plan"),
    [
        (0, 6, "single", [4, 1, 1]),
        (6, 10, "single", [1, 1, 8]),
        (0, 8, "none", [8]),
        (3, 9, "any", [9]),
        (0, 0, "single", []),
    ],
)
def test_split_plan(offset: int, n: int, partial: str, plan: list[int]) -> None:
    capabilities = replace(Capabilities(streaming="chunk", split_multiple=4), partial=partial)
    assert split_plan(offset, n, capabilities) == plan


@pytest.mark.parametrize(
    "promise",
    [
        {"streaming": "tokens"},
        {"growth": "const"},
        {"masked": "yes"},
        {"len_multiple": 0},
        {"includes": frozenset({"nrm"})},
    ],
)
def test_a_promise_that_means_nothing_is_refused(promise: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(promise))):
        Capabilities(**promise)


def test_split_plan_refuses_what_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        split_plan(2, 4, Capabilities(streaming="chunk", split_multiple=4, partial="none"))
    with pytest.raises(ValueError, match="PrefixReplay"):
        split_plan(0, 4, Capabilities(streaming="none"))
