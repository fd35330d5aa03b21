"""How a model width divides into heads. Never imports torch."""

from __future__ import annotations


def head_width(dim: int, published: int, *, even: bool = False) -> int:
    """The published width of a head, or the widest below it of which `dim` holds two heads or more.

    Args:
        dim: what is divided.
        published: the width that the authors use.
        even: whether only even widths will do.
    """
    step = 2 if even else 1
    most = min(published, max(dim // 2, step))
    return next((width for width in range(most - most % step, 0, -step) if dim % width == 0), dim)


def fit_heads(dim: int, heads: int, *, what: str = "dim", unit: int = 1) -> None:
    """Raise ValueError, with what would do, if `dim` is not `heads` equal heads of a multiple of `unit` channels.

    Args:
        dim: the width that is divided.
        heads: how many heads.
        what: its name, for the message.
        unit: what a head's width must be a multiple of.
    """
    if dim % (heads * unit) == 0 and dim:
        return
    usable = [n for n in range(1, dim + 1) if dim % (n * unit) == 0]
    near = [n for n in usable if n < heads][-1:] + [n for n in usable if n > heads][:1]
    instead = f"heads {' or '.join(map(str, near))}, or " if near else ""
    each = f" of a multiple of {unit} channels" if unit > 1 else ""
    raise ValueError(
        f"{what} {dim} is not divisible into {heads} equal heads{each}; "
        f"use {instead}{what} {max(-(-dim // (heads * unit)), 1) * heads * unit}"
    )


def scaled(dim: int, factor: float, what: str, *, of: str = "dim") -> int:
    """`factor` times `dim`, which are called `what` and `of`.

    Raises:
        ValueError: if that is not a whole number of channels.
    """
    width = round(dim * factor)
    if width < 1 or abs(width - dim * factor) > 1e-6:
        raise ValueError(
            f"{what} {factor:g} times {of} {dim} is not a whole number of channels; "
            f"use {what} {max(width, 1) / dim:.6g} for {max(width, 1)}, or another {of}"
        )
    return width
