"""Linformer beside the package linformer 0.2.3, with its defaults (8 heads, k = 256) and as long as the input."""

from __future__ import annotations

import contextlib

from altx import BuildContext
from altx.context import Context
from peers import Case


def cases(dim: int, length: int) -> list[Case]:
    from altx_linformer.config import LinformerConfig
    from altx_linformer.linformer import build

    config, peers = LinformerConfig(max_len=length), {}
    ours = build(config, BuildContext(dim=dim))  # by itself: a causal model would refuse it
    with contextlib.suppress(ImportError):
        from linformer import LinformerSelfAttention

        theirs = LinformerSelfAttention(dim, length, k=config.k, heads=config.heads)
        theirs.load_state_dict(ours.state_dict())
        peers["linformer"] = theirs
    return [Case("linformer", lambda x: ours(x, Context(causal=False)).y, ours, peers)]
