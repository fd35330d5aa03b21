"""Product-key memory beside product-key-memory 0.3.0, and a memory layer, each with 256^2 values.

The authors' memory layer needs a GPU, so it has no peer here.
"""

from __future__ import annotations

import contextlib
import warnings

from peers import Case, layer

KEYS = 256


def cases(dim: int, length: int) -> list[Case]:
    return [product_key(dim), memory_layer(dim)]


def product_key(dim: int) -> Case:
    ours, peers = layer("product-key", dim, "memory", keys=KEYS), {}
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        from product_key_memory import PKM

        memory = ours.memory
        theirs = PKM(dim, heads=memory.config.heads, num_keys=KEYS, topk=memory.config.topk)
        theirs.load_state_dict(memory.state_dict())
        peers["product-key-memory"] = theirs
    return Case("product-key", lambda x: ours(x).y, ours, peers)


def memory_layer(dim: int) -> Case:
    ours = layer("memory-layer", dim, "memory", keys=KEYS)
    return Case("memory-layer", lambda x: ours(x).y, ours)
