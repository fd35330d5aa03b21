"""One file per plugin: its layers beside the same layers of the libraries that people use today, weights and inputs
alike. Each has a function `cases(dim, length) -> list[Case]`, which leaves out the peers that are not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.resolve import resolve


@dataclass(frozen=True)
class Case:
    """One of our layers and its peers.

    Args:
        name: what is measured, e.g. "gated-deltanet".
        ours: x (B, T, D) -> y (B, T, D).
        peers: the same function by other libraries.
        modules: what holds our weights; the products of their matrices are the floor, unless there is another.
        exact: whether the peers compute the same numbers; where not, the docstring of the file says why.
        floor: what must be done at the least, where that is not the modules' products for every token.
    """

    name: str
    ours: Callable[[Tensor], Tensor]
    modules: nn.Module
    peers: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    exact: bool = True
    floor: Callable[[], Tensor] | None = None


def layer(name: str, dim: int, kind: str = "mixer", **config: Any) -> Any:
    """One layer of a token mixer, or of a feed-forward (`kind="feed_forward"`), with default settings but `config`."""
    reference = {"name": name, **config}
    blueprint = resolve(
        validate(ModelConfig, {"dim": dim, "blocks": [{"sublayers": [{kind: reference}]}]}), registry.default()
    )
    return build_branch(blueprint.blocks[0][0], BuildContext(dim=dim))
