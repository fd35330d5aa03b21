"""Backend "native": C, a chunk's products one after another, heads in parallel, with an adjoint that recomputes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive
from altx_titans.fast import Network, Norm, Weights
from altx_titans.kernels.learn import flat
from altx_titans.kernels.learn.flat import dense
from altx_titans.kernels.learn.reference import Chunks, Learned

LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"learn": "p" * 21 + "i" * 8 + "dddi", "learn_backward": "p" * 34 + "i" * 8 + "dddi"},
)

SERIAL = 1 << 20
"""Multiplications that are not worth waking a thread for."""


def unavailable(
    network: Network, chunks: Chunks, weights: Weights, start: Weights, moving: Weights, fresh: Weights, norm: Norm
) -> str | None:
    """Why it cannot run a call."""
    if chunks.key.device.type != "cpu":
        return f"the keys are on {chunks.key.device}, and native code runs on the CPU"
    return flat.too_much(network, weights)


def learn(
    network: Network, chunks: Chunks, weights: Weights, start: Weights, moving: Weights, fresh: Weights, norm: Norm
) -> Learned:
    """As the reference."""
    return flat.learn(FORWARD, network, chunks, weights, start, moving, fresh, norm)


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
    out, _, _, _, kept = flat.fake(
        key, value, query, keep, drift, share, last_keep, last_drift, last_share, moving_keep, moving_share, gain, bias,
        fresh, weights, start, moving, full, anew, width, inputs, norm, scaled, eps, factor, bound, save,
    )  # fmt: skip
    after = flat.copies(key, weights, start, moving)
    LIBRARY.call(
        "learn", key.dtype,
        *map(dense, (
            key, value, query, keep, drift, share, last_keep, last_drift, last_share, moving_keep, moving_share,
            full, anew, gain, bias, fresh,
        )),
        *after[:2], None if moving is None else after[2], None if query is None else out, kept if save else None,
        *_sizes(key, width, inputs, norm, scaled), eps, factor, bound, _threads(key),
    )  # fmt: skip
    return out, after[0], after[1], after[2], kept


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
    states, found, fresh = flat.room(given, kept, (dweights, dstart, dmoving), freshly)
    moves = kept.shape[3] == 3
    LIBRARY.call(
        "learn_backward", key.dtype, *map(dense, given[:11]), *map(dense, (full, anew, gain, bias)), kept,
        torch.zeros_like(value, memory_format=torch.contiguous_format) if dout is None else dense(dout),
        *states[:2], states[2] if moves else None, *found, fresh,
        *_sizes(key, width, inputs, norm, scaled), eps, factor, bound, _threads(key),
    )  # fmt: skip
    return flat.gathered(key, states, found, fresh, moves)


BACKWARD = Primitive("altx_titans::learn_backward", _backward, flat.fake_backward)
FORWARD = Primitive(
    "altx_titans::learn", _forward, flat.fake, save=flat.save, backward=flat.differentiate(BACKWARD), keep="save"
)
flat.count_flops(torch.ops.altx_titans.learn)
