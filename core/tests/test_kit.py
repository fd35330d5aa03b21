"""The kit itself: right components pass, and each wrong specimen fails exactly the check meant for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import specimens
import torch
from torch import Tensor

from altx.capabilities import Capabilities, Growth
from altx.context import Context
from altx.errors import ConfigError
from altx.layer import FRESH, Layer, Output
from altx.layout import append
from altx.recursion import Recursion
from altx.routed import Routed
from altx.state import Leaf, State
from altx.testing import CHECKS, Result, check_component, run
from altx.testing.case import Subject
from altx.testing.graphs import Chained
from altx.testing.partners import MovingAverage


def failed(results: list[Result]) -> list[str]:
    return [result.check for result in results if result.status == "failed"]


def test_a_right_mixer_passes_every_check() -> None:
    results = run(Subject("moving-average", lambda: MovingAverage(specimens.DIM)))
    assert failed(results) == [], [r for r in results if r.status == "failed"]
    assert {r.check for r in results if r.status == "skipped"} == {
        "scan",
        "recall",
        "kv-sharing",
        "graph",
        "graph-refused",
        "initialisation",
        "optimizer-options",
        "meta-build",
    }


@pytest.mark.parametrize("check", specimens.SPECIMENS)
def test_a_specimen_fails_exactly_its_check(check: str) -> None:
    layer = specimens.SPECIMENS[check]
    results = run(Subject(layer.__name__, lambda: layer(specimens.DIM)))
    assert failed(results) == [check.partition(" ")[0]], [r for r in results if r.status == "failed"]


@pytest.mark.parametrize("needed", [False, True])
def test_a_right_reader_of_graphs_passes_every_check(needed: bool) -> None:
    layer = specimens.NeedsNeighbours if needed else specimens.SumsNeighbours
    build = (lambda: Chained(layer(specimens.DIM))) if needed else (lambda: layer(specimens.DIM))
    results = run(Subject("graph", build))
    assert failed(results) == [], [r for r in results if r.status == "failed"]
    assert {r.status for r in results if r.check.startswith("graph")} == {"passed"}


def test_a_mixer_that_honestly_takes_no_mask_passes() -> None:
    class Unmasked(MovingAverage):
        capabilities = replace(MovingAverage.capabilities, masked=False)

        def forward(self, x, ctx=FRESH, state=None):
            assert ctx.mask is None
            return super().forward(x, ctx, state)

    assert failed(run(Subject("unmasked", lambda: Unmasked(specimens.DIM)))) == []


@pytest.mark.parametrize("count_padding", [True, False])
def test_a_router_that_counts_padding_fails_exactly_statistics(count_padding: bool) -> None:
    def build() -> object:
        router = specimens.CountingRouter(specimens.DIM, 3)
        router.count_padding = count_padding
        return specimens.routed(router)

    results = run(Subject("router", build))
    assert failed(results) == (["statistics"] if count_padding else []), [r for r in results if r.status == "failed"]


class Lists(MovingAverage):
    """Keeps every real token, and `more` slots besides for each."""

    capabilities = Capabilities(growth="linear", rollback="snapshot")
    more = 0

    def init_state(self, batch: int, capacity: int | None = None, **options: Any) -> State:
        state = super().init_state(batch, **options)
        slots = state["h"].new_zeros(batch, capacity or 0)
        return State({**state.leaves, "x": slots}, {**state.spec, "x": Leaf(seq_dim=1)}, seen=state.seen)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out = super().forward(x, ctx, state)
        if state is None or out.state is None or not x.shape[1]:
            return out
        assert state.seen is not None
        kept = append(state["x"], x[..., 0], state.seen, ctx.mask)
        return replace(out, state=out.state.replace(x=torch.nn.functional.pad(kept, (0, self.more * x.shape[1]))))


@pytest.mark.parametrize(
    ("more", "declared", "fails"), [(0, "linear", False), (3, "linear", True), (0, "window", True)]
)
@pytest.mark.parametrize("over", ["targets", "depths"])
def test_under_a_router_a_state_grows_by_at_most_what_is_declared(
    over: str, more: int, declared: Growth, fails: bool
) -> None:
    class Kept(Lists):
        capabilities = replace(Lists.capabilities, growth=declared)

    Kept.more = more

    def build() -> Layer:
        router = specimens.CountingRouter(specimens.DIM, 3)
        if over == "targets":
            return Routed(router, [Kept(specimens.DIM), MovingAverage(specimens.DIM), Kept(specimens.DIM)], "mixers")
        return Recursion(router, Kept(specimens.DIM), 3)

    (found,) = (result for result in run(Subject("kept", build), ["growth"]) if result.check == "growth")
    assert found.status == ("failed" if fails else "passed"), found
    if fails:
        assert f"declares growth {declared!r}" in found.message
        assert (declared == "linear") == ("of at most" in found.example)


@pytest.mark.parametrize("over", ["targets", "depths"])
def test_under_a_router_a_constant_state_does_not_pass_for_one_that_grows(over: str) -> None:
    def build() -> Layer:
        router = specimens.CountingRouter(specimens.DIM, 3)
        parts = [specimens.OverstatesGrowth(specimens.DIM) for _ in range(3)]
        return Routed(router, parts, "mixers") if over == "targets" else Recursion(router, parts[0], 3)

    assert [result.check for result in run(Subject("kept", build), ["growth"]) if result.status == "failed"] == [
        "growth"
    ]


def test_a_composer_that_overwrites_initial_weights_fails_exactly_initialisation() -> None:
    blueprint = specimens.feed_forward_blueprint()
    subject = Subject("swiglu", lambda: MovingAverage(specimens.DIM), blueprint=blueprint)
    assert failed(run(subject)) == []
    wrong = Subject("swiglu", subject.build, blueprint=blueprint, compose=specimens.reinitialising_composer)
    assert failed(run(wrong)) == ["initialisation"]


def test_a_law_that_builds_on_a_broken_one_is_skipped_and_says_so() -> None:
    results = {r.check: r for r in run(Subject("ahead", lambda: specimens.LooksAhead(specimens.DIM)))}
    assert results["initial-state"].status == "skipped"
    assert results["initial-state"].message == "needs causality"


def test_only_runs_a_check_with_what_it_builds_on() -> None:
    names = {r.check for r in check_component("swiglu", only=["halves"])}
    assert {"halves", "initial-state", "causality"} <= names
    assert "gradcheck" not in names


def test_an_unknown_check_is_an_error_that_lists_them() -> None:
    with pytest.raises(ConfigError, match=r"no check 'halfs'(.|\n)*halves"):
        check_component("swiglu", only=["halfs"])


def test_every_check_has_a_law_in_words() -> None:
    assert all(len(law.split()) > 3 for law in CHECKS.values())


def test_checks_run_on_one_thread_and_leave_the_rest_as_many_as_there_were() -> None:
    class Counts(MovingAverage):
        def forward(self, *args, **kwargs):
            threads.add(torch.get_num_threads())
            return super().forward(*args, **kwargs)

    threads, before = set(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(Subject("counts", lambda: Counts(16)), ["shapes"])
        assert threads == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
