"""The kit itself: right components pass, and each wrong specimen fails exactly the check meant for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import specimens
import torch

from altx.errors import ConfigError
from altx.layer import FRESH
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
