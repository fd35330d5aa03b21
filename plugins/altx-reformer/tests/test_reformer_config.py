"""Settings that do not fit say what would."""

from __future__ import annotations

from typing import Any

import pytest

from altx.compose import compose
from altx.errors import ConfigError

REFUSED = [
    ("reformer", 20, {}, "dim 20 is not divisible by heads 8; use heads 5 or 10, or dim 32"),
    ("reformer", 24, {}, "rotary needs an even head_dim, and dim 24 / heads 8 is 3; use heads 6 or 12, or dim 32"),
    ("reformer", 16, {"head_dim": 3}, "use head_dim 4, or rotary false"),
    ("reformer", 16, {"num_buckets": 7}, "num_buckets 7 is not an even number above 0 .* use 6 or 8"),
    ("reformer", 16, {"num_buckets": 0}, "use 2 or 4"),
    ("reformer", 16, {"num_buckets": [4, 3]}, "num_buckets 3 is not an even number .* use 2 or 4"),
    ("reformer", 16, {"num_buckets": []}, "empty list; use an even number"),
    ("reformer", 16, {"bucket_size": 0}, "bucket_size.* greater than 0"),
    ("reformer", 16, {"n_hashes": 0}, "n_hashes.* greater than 0"),
    ("reformer", 16, {"heads": 0}, "heads.* greater than 0"),
    ("reformer", 16, {"chunking": "none"}, "'causal' or 'published'"),
    ("reformer", 16, {"bucket": 4}, "bucket"),
    ("reformer-local", 20, {}, "dim 20 is not divisible by heads 8"),
    ("reformer-local", 16, {"chunk_size": 1, "before": 0}, "use chunk_size 2 or before 1"),
    ("reformer-local", 16, {"before": -1}, "before.* greater than or equal to 0"),
]


@pytest.mark.parametrize(("name", "dim", "settings", "message"), REFUSED)
def test_what_does_not_fit_is_refused(name: str, dim: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose({"dim": dim, "mixer": [{"name": name, **settings}]})


@pytest.mark.parametrize("name", ["reformer", "reformer-local"])
@pytest.mark.parametrize("dim", [16, 32, 64, 768])
def test_the_defaults_fit_usual_widths(name: str, dim: int) -> None:
    compose({"dim": dim, "mixer": [name], "layers": 1})
