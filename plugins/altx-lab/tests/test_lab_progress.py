"""What is said of a step's routers."""

from __future__ import annotations

from altx_lab.progress import average, largest, least, max_load


def test_the_largest_load_and_drop_rate_of_all_routers() -> None:
    metrics = {
        "a.router.load": [3.0, 1.0], "a.router.max_load": 1.5, "b.router.max_load": 1.25, "a.router.drop_rate": 0.0,
        "b.router.drop_rate": 0.25,
    }  # fmt: skip
    assert max_load(metrics) == 1.5 and largest(metrics, "drop_rate") == 0.25
    assert max_load({"a.router.load": [3.0, 1.0]}) == 1.5
    assert max_load({"x.entropy": 1.0}) is None and largest({}, "drop_rate") is None


def test_the_least_entropy_and_the_most_tokens_without_a_target_of_all_routers() -> None:
    metrics = {"a.router.entropy": 1.5, "b.router.entropy": 0.5, "a.router.no_target": 3, "b.router.no_target": 7}
    assert least(metrics, "router.entropy") == 0.5 and largest(metrics, "no_target") == 7
    assert least({}, "router.entropy") is None


def test_the_mean_depth_of_all_recursions() -> None:
    assert average({"a.mean_depth": 2.0, "b.mean_depth": 1.5, "b.active": [2, 1]}, "mean_depth") == 1.75
    assert average({}, "mean_depth") is None
