"""Tensors inside tuples, named tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def map_leaves(fn: Callable[[str, Tensor], Tensor], value: Any, name: str = "") -> Any:
    """The same structure with `fn(name, tensor)` in place of each tensor; names look like `write.heads[0]`.

    Args:
        fn: makes the tensor that takes the place of another.
        value: a tensor, a structure of tensors, or anything else, which is kept.
        name: name of the whole; keys of a nameless mapping are names by themselves.
    """
    if isinstance(value, Tensor):
        return fn(name, value)
    if isinstance(value, dict):
        return {key: map_leaves(fn, item, f"{name}.{key}" if name else key) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = zip(value._fields, value, strict=True)
        return type(value)(*[map_leaves(fn, item, f"{name}.{key}") for key, item in fields])
    if isinstance(value, (tuple, list)):
        return type(value)([map_leaves(fn, item, f"{name}[{index}]") for index, item in enumerate(value)])
    return value


def map_floats(fn: Callable[[str, Tensor], Tensor], value: Any) -> Any:
    """As `map_leaves` for floating tensors, given detached; what `fn` makes of them requires gradients as they did."""

    def one(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return fn(name, tensor.detach()).detach().requires_grad_(tensor.requires_grad)

    return map_leaves(one, value)


def leaves(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a structure by name; see `map_leaves`."""
    found: dict[str, Tensor] = {}
    map_leaves(lambda name, tensor: found.setdefault(name, tensor), value, name)
    return found
