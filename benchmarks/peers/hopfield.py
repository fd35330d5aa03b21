"""Hopfield layer beside its authors', which is on GitHub alone (ml-jku/hopfield-layers), with defaults and with heads.

The authors' layer is told never to stop its updates early, which would depend on the inputs.
"""

from __future__ import annotations

import contextlib

from peers import Case, layer


def cases(dim: int, length: int) -> list[Case]:
    return [case("hopfield", dim, heads=1, updates=1), case("hopfield, 4 heads, 3 updates", dim, heads=4, updates=3)]


def case(name: str, dim: int, heads: int, updates: int) -> Case:
    ours, peers = layer("hopfield", dim, "memory", heads=heads, updates=updates), {}
    with contextlib.suppress(ImportError):
        from hflayers import HopfieldLayer

        memory = ours.memory
        theirs = HopfieldLayer(
            dim,
            num_heads=heads,
            quantity=memory.config.patterns,
            update_steps_max=updates - 1,
            update_steps_eps=1e-30,
        )
        theirs.load_state_dict({place(name): weight for name, weight in memory.state_dict().items()})
        peers["hopfield-layers"] = theirs
    return Case(name, lambda x: ours(x).y, ours, peers)


def place(name: str) -> str:
    """The authors' name of one of our weights."""
    if name.endswith("_weights"):
        return name
    return f"hopfield.{name}" if name.startswith("norm") else f"hopfield.association_core.{name}"
