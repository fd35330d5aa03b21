"""Whether an inner width divides into heads, and heads into groups. Never imports torch."""

from __future__ import annotations

from math import gcd


def fit_heads(dim: int, expand: int, head_dim: int, n_groups: int) -> None:
    """Raise ValueError, with what would do, if expand * dim is not whole heads or these not whole groups."""
    inner = expand * dim
    if inner % head_dim:
        unit = head_dim // gcd(head_dim, expand)
        raise ValueError(
            f"the inner width {inner} (expand {expand} * dim {dim}) is not divisible by head_dim {head_dim}; "
            f"use head_dim {gcd(inner, head_dim)}, or dim {-(-dim // unit) * unit}"
        )
    heads = inner // head_dim
    if heads % n_groups:
        raise ValueError(
            f"{heads} heads (expand {expand} * dim {dim} / head_dim {head_dim}) cannot form {n_groups} equal groups; "
            f"use n_groups {gcd(heads, n_groups)}"
        )
