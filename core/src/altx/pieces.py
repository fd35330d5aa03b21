"""Long sequences piece by piece, where no gradient is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from altx.context import Context
from altx.layer import Layer, Output
from altx.state import State

TOKENS = 2048
"""Tokens of a piece, over all rows: enough for the matrix products, few enough for the cache."""

SHORTEST = 256
"""Tokens of a piece in each row at the least."""


def in_pieces(layer: Layer, x: Tensor, ctx: Context, state: State | None) -> Output | None:
    """What a recurrent layer makes of x (B, T, D), computed piece by piece; None where x should go through whole.

    On a CPU, memory that was just handed out costs more to touch than to compute with. The temporaries of a piece fit
    into memory that is used again and again, so a token costs the same however long the sequence.
    """
    # Before any size is looked at, which a graph for all sizes would be bound by.
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return None
    batch, length = x.shape[:2]
    piece = max(SHORTEST, TOKENS // max(batch, 1))
    if length < 2 * piece:
        return None
    y, carried = None, state
    exports: dict[str, list[Tensor]] = {}
    if carried is None:
        carried = layer.init_state(batch, device=x.device)
    for start in range(0, length, piece):
        now = slice(start, min(start + piece, length))
        out = layer(x[:, now], ctx.slice(now.start, now.stop), carried)
        if y is None:
            y = out.y.new_empty(x.shape)  # in the dtype of the result, which autocast may have chosen
        y[:, now], carried = out.y, out.state
        for name, exported in out.exports.items():
            exports.setdefault(name, []).append(exported)
    assert y is not None
    whole = {name: torch.cat(each, 1) for name, each in exports.items()}
    return Output(y, None if state is None else carried, exports=whole)
