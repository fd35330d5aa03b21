"""Backend "native": C, a chunk's products one after another, heads in parallel, with an adjoint that recomputes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from altx_kernels.arguments import precise
from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_titans.fast import Network, Norm, Weights
from altx_titans.kernels.learn.reference import Chunks, Learned

LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"learn": "p" * 21 + "i" * 8 + "dddi", "learn_backward": "p" * 34 + "i" * 8 + "dddi"},
)

PAD = 16
"""As in native.c."""

SERIAL = 1 << 20
"""Multiplications that are not worth waking a thread for."""


def unavailable(
    network: Network, chunks: Chunks, weights: Weights, start: Weights, moving: Weights, fresh: Weights, norm: Norm
) -> str | None:
    """Why it cannot run a call."""
    if chunks.key.device.type != "cpu":
        return f"the keys are on {chunks.key.device}, and native code runs on the CPU"
    if network.layers > 1:
        return f"it has one layer, and this network has {network.layers}"
    if network.bound is not None and "b1" in weights:
        return "it bounds the gradients of a matrix and of a scale, and not of a bias"
    return None


def learn(
    network: Network, chunks: Chunks, weights: Weights, start: Weights, moving: Weights, fresh: Weights, norm: Norm
) -> Learned:
    """As the reference."""
    states = [_packed(state) for state in (fresh, weights, start, moving)]
    gain, bias = (_wide(x, chunks.key) if network.norm else None for x in norm)
    key, value, query, *coefficients = chunks[:-2]
    biased = "b1" in weights
    floats = [_tokens(key, biased), _tokens(value), _tokens(query, biased), *coefficients, gain, bias, *states]
    dtype = precise(*floats)
    width = value.shape[-1]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    out, *after, _ = FORWARD(
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


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _sizes(key: Tensor, width: int, inputs: int, norm: bool, scaled: bool) -> tuple[int, ...]:
    return (*key.shape[:4], width, inputs, int(norm), int(scaled))


def _threads(key: Tensor) -> int:
    heads = key.shape[0] * key.shape[1]
    return max(1, min(heads, torch.get_num_threads())) if key.numel() * key.shape[-1] >= SERIAL else 1


def _forward(
    key: Tensor, value: Tensor, query: Tensor | None, keep: Tensor, drift: Tensor | None, share: Tensor,
    last_keep: Tensor, last_drift: Tensor | None, last_share: Tensor, moving_keep: Tensor | None,
    moving_share: Tensor | None, gain: Tensor | None, bias: Tensor | None, fresh: Tensor | None, weights: Tensor,
    start: Tensor, moving: Tensor | None, full: Tensor, anew: Tensor | None, width: int, inputs: int, norm: bool,
    scaled: bool, eps: float, factor: float, bound: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What was read, the states after, and those before every chunk for the adjoint; empty where there is none."""
    out, _, _, _, kept = _fake(
        key, value, query, keep, drift, share, last_keep, last_drift, last_share, moving_keep, moving_share, gain, bias,
        fresh, weights, start, moving, full, anew, width, inputs, norm, scaled, eps, factor, bound, save,
    )  # fmt: skip
    after = [
        key.new_empty(0) if x is None else x.clone(memory_format=torch.contiguous_format)
        for x in (weights, start, moving)
    ]
    LIBRARY.call(
        "learn", key.dtype,
        *map(_dense, (
            key, value, query, keep, drift, share, last_keep, last_drift, last_share, moving_keep, moving_share,
            full, anew, gain, bias, fresh,
        )),
        *after[:2], None if moving is None else after[2], None if query is None else out, kept if save else None,
        *_sizes(key, width, inputs, norm, scaled), eps, factor, bound, _threads(key),
    )  # fmt: skip
    return out, after[0], after[1], after[2], kept


def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:13], *inputs[17:19], output[4])
    ctx.form, ctx.moves, ctx.freshly = inputs[19:26], inputs[16] is not None, inputs[13] is not None


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the 17 floating arguments."""
    *given, full, anew, kept = ctx.saved_tensors
    found = BACKWARD(*gradients[:4], *given, full, anew, kept, ctx.freshly, *ctx.form)
    there = [x is not None for x in given] + [ctx.freshly, True, True, ctx.moves]
    return *(g if t else None for g, t in zip(found, there, strict=True)), *(None,) * 10


def _backward(
    dout: Tensor | None, dweights: Tensor | None, dstart: Tensor | None, dmoving: Tensor | None,
    key: Tensor, value: Tensor, query: Tensor | None, keep: Tensor, drift: Tensor | None, share: Tensor,
    last_keep: Tensor, last_drift: Tensor | None, last_share: Tensor, moving_keep: Tensor | None,
    moving_share: Tensor | None, gain: Tensor | None, bias: Tensor | None, full: Tensor, anew: Tensor | None,
    kept: Tensor, freshly: bool, width: int, inputs: int, norm: bool, scaled: bool, eps: float, factor: float,
    bound: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the first 17 arguments of `_forward`, empty where there is none."""
    given = (
        key, value, query, keep, drift, share, last_keep, last_drift, last_share, moving_keep, moving_share, gain, bias
    )  # fmt: skip
    moves = kept.shape[3] == 3
    rows = (*kept.shape[:2], *kept.shape[4:])
    states = [
        kept.new_zeros(rows) if x is None or not x.numel() else x.clone(memory_format=torch.contiguous_format)
        for x in (dweights, dstart, dmoving)
    ]
    # Every row of the batch has its own gradient of the norm; they are added up at the end.
    found = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given[:11]]
    found += [None if x is None else x.new_zeros(key.shape[0], *x.shape) for x in (gain, bias)]
    fresh = kept.new_zeros(rows) if freshly else None
    LIBRARY.call(
        "learn_backward", key.dtype, *map(_dense, given[:11]), *map(_dense, (full, anew, gain, bias)), kept,
        torch.zeros_like(value, memory_format=torch.contiguous_format) if dout is None else _dense(dout),
        *states[:2], states[2] if moves else None, *found, fresh,
        *_sizes(key, width, inputs, norm, scaled), eps, factor, bound, _threads(key),
    )  # fmt: skip
    nothing = key.new_empty(0)
    sums = [None if x is None else x.sum(0) for x in found[11:]]
    results = [*found[:11], *sums, fresh, *states[:2], states[2] if moves else None]
    return [nothing if x is None else x for x in results]


def _fake_backward(*inputs: Any) -> list[Tensor]:
    given, kept, freshly = inputs[4:17], inputs[19], inputs[20]
    nothing, rows = kept.new_empty(0), (*kept.shape[:2], *kept.shape[4:])
    found = [nothing if x is None else x.new_empty(x.shape) for x in given]
    found += [kept.new_empty(rows) if there else nothing for there in (freshly, True, True, kept.shape[3] == 3)]
    return found


BACKWARD = Primitive("altx_titans::learn_backward", _backward, _fake_backward)
FORWARD = Primitive("altx_titans::learn", _forward, _fake, save=_save, backward=_differentiate, keep="save")


@register_flop_formula(torch.ops.altx_titans.learn)
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
