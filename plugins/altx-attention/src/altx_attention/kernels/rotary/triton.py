"""Rotation on a GPU: a program turns all heads of a token."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from altx_attention.kernels.rotary.native import fake, save
from altx_kernels.gpu.launching import DEVICE, launch, power_of_2
from altx_kernels.primitive import Primitive

TILE = 4096
"""Numbers of x that a program holds at a time."""


@triton.jit(do_not_specialize=["T"])
def kernel(
    x, cos, sin, y, T, sb, st, sh, H, D, E, FIRST, sign,
    INTERLEAVE: tl.constexpr, SHARED: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    d = tl.arange(0, BD)[None, :]
    i = d - FIRST
    inside = (i >= 0) & (i < 2 * E)
    # The plane of a feature, the other one in it, and which of the two it is.
    if INTERLEAVE:
        plane = i // 2
        second = i % 2
        other = d + 1 - 2 * second
    else:
        second = (i >= E).to(tl.int32)
        plane = i - E * second
        other = d + E - 2 * E * second
    angle = (t if SHARED else row) * E + plane
    c = tl.load(cos + angle, inside, 1.0).to(tl.float32)
    s = tl.load(sin + angle, inside, 0.0).to(tl.float32) * sign * (2 * second - 1)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)[:, None]
        here = x + b * sb + t * st + h * sh
        mask = (h < H) & (d < D)
        own = tl.load(here + d, mask, 0.0).to(tl.float32)
        partner = tl.load(here + other, mask & inside, 0.0).to(tl.float32)
        tl.store(y + (row * H + h) * D + d, (own * c + partner * s).to(y.dtype.element_ty), mask)


def _forward(x: Tensor, cos: Tensor, sin: Tensor, first: int, interleave: bool, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    B, T, H, D = x.shape
    width = power_of_2(D)
    height = min(power_of_2(H, 1), max(1, TILE // width))
    launch(
        kernel, (B * T if x.numel() else 0,), x, cos.contiguous(), sin.contiguous(), y, T, *x.stride()[:3], H, D,
        cos.shape[-1], first, -1.0 if back else 1.0, INTERLEAVE=interleave, SHARED=len(cos) == 1, BH=height, BD=width,
        num_warps=min(8, max(1, height * width // 512)),
    )  # fmt: skip
    return y


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    first, interleave, back = ctx.options
    return FORWARD(dy, *ctx.saved_tensors, first, interleave, not back), None, None, None, None, None


# The gradient is the turn back.
FORWARD = BACKWARD = Primitive(
    "altx_attention::rotary_triton", _forward, fake, save=save, backward=_differentiate, device=DEVICE
)


def run(x: Tensor, cos: Tensor, sin: Tensor, *, first: int = 0, interleave: bool = False) -> Tensor:
    """As `altx_attention.kernels.rotary.rotary`; no float64."""
    y: Tensor = FORWARD(x, cos, sin, first, interleave, False)
    return y
