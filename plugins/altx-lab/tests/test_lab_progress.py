"""What is said of a step's routers."""

from __future__ import annotations

from altx_lab.progress import largest, max_load


def test_the_largest_load_and_drop_rate_of_all_routers() -> None:
    metrics = {
        "a.router.load": [3.0, 1.0], "a.router.max_load": 1.5, "b.router.max_load": 1.25, "a.router.drop_rate": 0.0,
        "b.router.drop_rate": 0.25,
    }  # fmt: skip
    assert max_load(metrics) == 1.5 and largest(metrics, "drop_rate") == 0.25
    assert max_load({"a.router.load": [3.0, 1.0]}) == 1.5
    assert max_load({"x.entropy": 1.0}) is None and largest({}, "drop_rate") is None
