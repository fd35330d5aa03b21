"""What kernels of the loop over chunks are called with: tensors side by side, one network layer, rows of PAD numbers.

The 19 tensors: key, value, query and the eight coefficients of `Chunks`; the norm's gain and bias (H, P); the states
fresh, weights, start and moving (B, H, R, P); full and anew. A layer's bias is a row of a state behind those of its
matrix, and keys and queries have a 1 for it; the norm's scale is the last row. What is beyond a width is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from altx_kernels.arguments import precise
from altx_kernels.primitive import Primitive
from altx_titans.fast import Network, Norm, Weights
from altx_titans.kernels.learn.reference import Chunks, Learned

PAD = 16
"""As in native.c."""

WIDEST = 128
"""Width of a head on a GPU."""

LONGEST = 32
"""Tokens of a chunk on a GPU."""


def too_much(network: Network, weights: Weights) -> str | None:
    """Why no kernel can run a network, or None."""
    if network.layers > 1:
        return f"it has one layer, and this network has {network.layers}"
    if network.bound is not None and "b1" in weights:
        return "it bounds the gradients of a matrix and of a scale, and not of a bias"
    return None


def too_large(
    network: Network, chunks: Chunks, weights: Weights, start: Weights, moving: Weights, fresh: Weights, norm: Norm
) -> str | None:
    """Why a GPU's kernels cannot run a call, or None."""
    tokens, width = chunks.key.shape[-2:]
    if width > WIDEST:
        return f"a head of width {width} is larger than the {WIDEST} that fit a program's registers"
    if tokens > LONGEST:
        return f"a chunk of {tokens} tokens is larger than the {LONGEST} that fit a program's registers"
    for state in (weights, start, moving, fresh):
        for name, x in state.items():
            if x.dtype == torch.float64:
                return f"the weights {name} are float64, and Triton kernels compute in float32"
    return too_much(network, weights)


def learn(
    forward: Primitive, network: Network, chunks: Chunks, weights: Weights, start: Weights, moving: Weights,
    fresh: Weights, norm: Norm,
) -> Learned:  # fmt: skip
    """As the reference, by a primitive."""
    states = [_packed(state) for state in (fresh, weights, start, moving)]
    gain, bias = (_wide(x, chunks.key) if network.norm else None for x in norm)
    key, value, query, *coefficients = chunks[:-2]
    biased = "b1" in weights
    floats = [_tokens(key, biased), _tokens(value), _tokens(query, biased), *coefficients, gain, bias, *states]
    dtype = precise(*floats)
    width = value.shape[-1]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    out, *after, _ = forward(
        *(None if x is None else x.to(dtype) for x in floats), chunks.full, chunks.anew,
        width, key.shape[-1] + biased, network.norm, "scale" in weights, network.eps, network.factor,
        network.bound or 0.0, save,
    )  # fmt: skip
    done = [
        {name: part.to(before[name].dtype) for name, part in _unpacked(rows, before, width).items()}
        for rows, before in zip(after, (weights, start, moving), strict=True)
    ]
    return Learned(None if query is None else out[..., :width].to(value.dtype), *done)


def _tokens(x: Tensor | None, biased: bool = False) -> Tensor | None:
    """x (..., d) with a 1 where the layer has a bias, and zeros up to a multiple of PAD."""
    if x is None:
        return None
    x = F.pad(x, (0, 1), value=1.0) if biased else x
    return F.pad(x, (0, -x.shape[-1] % PAD))


def _packed(state: Weights) -> Tensor | None:
    """Matrix, bias and scale as rows (B, H, R, P)."""
    rows = [state[name] for name in ("w1", "b1", "scale") if name in state]
    return _tokens(torch.cat(rows, 2)) if rows else None


def _unpacked(rows: Tensor, like: Weights, width: int) -> dict[str, Tensor]:
    """The weights, named and in the order of those before."""
    found, at = {}, 0
    for name in ("w1", "b1", "scale"):
        if name in like:
            found[name] = rows[:, :, at : at + like[name].shape[2], :width]
            at += like[name].shape[2]
    return {name: found[name] for name in like}


def _wide(x: Tensor | float, key: Tensor) -> Tensor:
    """The norm's gain or bias as (H, P)."""
    if not isinstance(x, Tensor):
        x = key.new_full((key.shape[1], 1, key.shape[-1]), x)
    wide = _tokens(x[:, 0])
    assert wide is not None
    return wide


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def copies(key: Tensor, *states: Tensor | None) -> list[Tensor]:
    """States that a kernel moves on where they lie; empty where there is none."""
    return [key.new_empty(0) if x is None else x.clone(memory_format=torch.contiguous_format) for x in states]


def fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    key, value, query, weights, start, moving = *inputs[:3], *inputs[14:17]
    states = 2 if moving is None else 3
    kept = (*key.shape[:3], states, *weights.shape[2:]) if inputs[-1] else (0,)
    nothing = key.new_empty(0)
    return (
        nothing if query is None else value.new_empty(value.shape),
        weights.new_empty(weights.shape),
        start.new_empty(start.shape),
        nothing if moving is None else moving.new_empty(moving.shape),
        key.new_empty(kept),
    )


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:13], *inputs[17:19], output[4])
    ctx.form, ctx.moves, ctx.freshly = inputs[19:26], inputs[16] is not None, inputs[13] is not None


def differentiate(adjoint: Primitive) -> Callable[..., tuple[Tensor | None, ...]]:
    """Gradients of the 17 floating arguments of a primitive whose adjoint this is."""

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, full, anew, kept = ctx.saved_tensors
        found = adjoint(*gradients[:4], *given, full, anew, kept, ctx.freshly, *ctx.form)
        there = [x is not None for x in given] + [ctx.freshly, True, True, ctx.moves]
        return *(g if t else None for g, t in zip(found, there, strict=True)), *(None,) * 10

    return backward


def room(
    given: tuple[Tensor | None, ...], kept: Tensor, after: tuple[Tensor | None, ...], freshly: bool
) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
    """Gradients of the states after the last chunk, to become those before the first; and room for all others."""
    rows = (*kept.shape[:2], *kept.shape[4:])
    states = [
        kept.new_zeros(rows) if x is None or not x.numel() else x.clone(memory_format=torch.contiguous_format)
        for x in after
    ]
    found = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given[:11]]
    # Every row of the batch has its own gradient of the norm; they are added up at the end.
    found += [None if x is None else x.new_zeros(kept.shape[0], *x.shape) for x in given[11:]]
    return states, found, kept.new_zeros(rows) if freshly else None


def gathered(
    key: Tensor, states: list[Tensor], found: list[Tensor | None], fresh: Tensor | None, moves: bool
) -> list[Tensor]:
    """Gradients of the 17 tensors, empty where there is none."""
    sums = [None if x is None else x.sum(0) for x in found[11:]]
    results = [*found[:11], *sums, fresh, *states[:2], states[2] if moves else None]
    return [key.new_empty(0) if x is None else x for x in results]


def fake_backward(*inputs: Any) -> list[Tensor]:
    given, kept, freshly = inputs[4:17], inputs[19], inputs[20]
    nothing, rows = kept.new_empty(0), (*kept.shape[:2], *kept.shape[4:])
    found = [nothing if x is None else x.new_empty(x.shape) for x in given]
    found += [kept.new_empty(rows) if there else nothing for there in (freshly, True, True, kept.shape[3] == 3)]
    return found


def count_flops(op: Any) -> None:
    """Register how many flops a primitive takes."""
    register_flop_formula(op)(_flops)


def _flops(*inputs, out_shape=None, **_) -> int:  # type: ignore[no-untyped-def]
    """As those of the reference: products, and what moves the weights."""
    key, query, moving, width, rows, scaled = inputs[0], inputs[2], inputs[16], *inputs[19:21], inputs[22]
    batch, heads, chunks, tokens = key[:4]
    moves = moving is not None
    # Of the gradients, of what is read, and of the updates.
    matrices = 1 + (query is not None) * (1 + moves) + 1 + moves
    within = 0 if query is None else 2 * tokens * tokens * (rows + width * (1 + scaled))
    moved = 4 * (1 + 2 * moves) * rows * width
    return int(batch * heads * chunks * (2 * tokens * rows * width * matrices + within + moved))
