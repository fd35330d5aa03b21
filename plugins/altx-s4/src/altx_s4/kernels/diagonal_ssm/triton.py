"""The diagonal state space on a GPU: a program keeps the states of a block of channels in registers, token after token.

The gradient walks through a row once forwards, writing the state down every few tokens, and once backwards,
recomputing the states between from that. It is summed over rows in a fixed order.
"""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator, var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.launching import DEVICE, launch, power_of_2
from altx_kernels.primitive import Primitive

# Tokens between two states that the gradient writes down.
KEEP = 8


@triton.jit
def both(mask, there):
    """`mask` where the token is there. The interpreter joins a block's mask with another block's only."""
    return mask & (tl.zeros(mask.shape, tl.int32) + there.to(tl.int32) != 0)


@triton.jit
def pair(pointer, at, N, mask):
    """Real and imaginary parts of a block's complex numbers; zeros if there are none."""
    re = tl.zeros(mask.shape, tl.float32)
    im = tl.zeros(mask.shape, tl.float32)
    if pointer is not None:
        re = tl.load(pointer + at, mask, 0.0).to(tl.float32)
        im = tl.load(pointer + at + N, mask, 0.0).to(tl.float32)
    return re, im


@triton.jit
def store_pair(pointer, at, N, mask, re, im):
    if pointer is not None:
        tl.store(pointer + at, re, mask)
        tl.store(pointer + at + N, im, mask)


@triton.jit
def token(x, t, stride, plane, d, live, PLANES: tl.constexpr):
    """x of a token, its imaginary part zero where there is none."""
    re = tl.load(x + t * stride + d, live, 0.0).to(tl.float32)
    im = re * 0
    if PLANES == 2:
        im = tl.load(x + t * stride + plane + d, live, 0.0).to(tl.float32)
    return re, im


@triton.jit
def advance(hr, hi, x, x2, ar, ai, br, bi, wr, wi, vr, vi, LOW: tl.constexpr):
    """The state after a token, and what its low-rank part took from the state before it."""
    ur = tl.zeros(hr.shape, tl.float32) + x[:, None]
    ui = tl.zeros(hr.shape, tl.float32) + x2[:, None]
    joined = x * 0
    if LOW:
        joined = tl.sum(vr * hr - vi * hi, 1)
        ur = br * x[:, None] - wr * joined[:, None]
        ui = bi * x[:, None] - wi * joined[:, None]
    re = (ar * hr + ur) + (hr - ai * hi)
    im = (ar * hi + ui) + (hi + ai * hr)
    return re, im, joined


@triton.jit
def last_of(lengths, row, T):
    stop = T
    if lengths is not None:
        stop = tl.minimum(tl.maximum(tl.load(lengths + row), 0), T).to(tl.int32)
    return stop


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x, rate, c, b, w, v, skip, reset, lengths, y, begin, end, T, stride, plane, H, N,
    PLANES: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = b is not None
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d = d < H
    mask = in_d[:, None] & (n < N)[None, :]
    at = d[:, None] * (2 * N) + n[None, :]
    ar, ai = pair(rate, at, N, mask)
    cr, ci = pair(c, at, N, mask)
    br, bi = pair(b, at, N, mask)
    wr, wi = pair(w, at, N, mask)
    vr, vi = pair(v, at, N, mask)
    through = tl.zeros([BD], tl.float32)
    if skip is not None:
        through = tl.load(skip + d, in_d, 0.0).to(tl.float32)
    hr, hi = pair(begin, row * H * 2 * N + at, N, mask)
    for step in tl.range(0, last_of(lengths, row, T), num_stages=3):
        t = row * T + step
        xr, xi = token(x, t, stride, plane, d, in_d, PLANES)
        if reset is not None:
            again = tl.load(reset + t) != 0
            hr = tl.where(again, 0.0, hr)
            hi = tl.where(again, 0.0, hi)
        hr, hi, _joined = advance(hr, hi, xr, xi, ar, ai, br, bi, wr, wi, vr, vi, LOW)
        out = tl.sum(cr * hr - ci * hi, 1) + through * xr
        tl.store(y + t * PLANES * H + d, out.to(y.dtype.element_ty), in_d)
        if PLANES == 2:
            out = tl.sum(cr * hi + ci * hr, 1)
            tl.store(y + (t * 2 + 1) * H + d, out.to(y.dtype.element_ty), in_d)
    store_pair(end, row * H * 2 * N + at, N, mask, hr, hi)


@triton.jit(do_not_specialize=["T", "checked"])
def backward_kernel(
    dy, x, rate, c, b, w, v, skip, reset, lengths, begin, d_end, checks, dx, d_rate, dc, db, dw, dv, d_skip, d_begin,
    T, checked, stride, plane, H, N, PLANES: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = b is not None
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d = d < H
    mask = in_d[:, None] & (n < N)[None, :]
    at = d[:, None] * (2 * N) + n[None, :]
    whole = row * H * 2 * N
    ar, ai = pair(rate, at, N, mask)
    cr, ci = pair(c, at, N, mask)
    br, bi = pair(b, at, N, mask)
    wr, wi = pair(w, at, N, mask)
    vr, vi = pair(v, at, N, mask)
    through = tl.zeros([BD], tl.float32)
    if skip is not None:
        through = tl.load(skip + d, in_d, 0.0).to(tl.float32)
    stop = last_of(lengths, row, T)
    number = tl.cdiv(stop, KEPT)
    check = row * checked * H * 2 * N + at
    hr, hi = pair(begin, whole + at, N, mask)
    for k in range(number):
        store_pair(checks, check + k * H * 2 * N, N, mask, hr, hi)
        for j in tl.static_range(KEPT):
            t = k * KEPT + j
            there = t < stop
            xr, xi = token(x, row * T + t, stride, plane, d, both(in_d, there), PLANES)
            if reset is not None:
                again = tl.load(reset + row * T + t, there, 0) != 0
                hr = tl.where(again, 0.0, hr)
                hi = tl.where(again, 0.0, hi)
            hr, hi, _joined = advance(hr, hi, xr, xi, ar, ai, br, bi, wr, wi, vr, vi, LOW)
    tl.debug_barrier()

    gr, gi = pair(d_end, whole + at, N, mask)
    zero = tl.zeros([BD, BN], tl.float32)
    rate_r, rate_i, c_r, c_i = zero, zero, zero, zero
    b_r, b_i, w_r, w_i, v_r, v_i = zero, zero, zero, zero, zero, zero
    d_through = tl.zeros([BD], tl.float32)
    for back in range(number):
        k = number - 1 - back
        hr, hi = pair(checks, check + k * H * 2 * N, N, mask)
        real = ()
        imaginary = ()
        for j in tl.static_range(KEPT):
            t = k * KEPT + j
            there = t < stop
            xr, xi = token(x, row * T + t, stride, plane, d, both(in_d, there), PLANES)
            if reset is not None:
                again = tl.load(reset + row * T + t, there, 0) != 0
                hr = tl.where(again, 0.0, hr)
                hi = tl.where(again, 0.0, hi)
            real = real + (hr,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no star)
            imaginary = imaginary + (hi,)  # type: ignore[assignment]  # noqa: RUF005
            hr, hi, _joined = advance(hr, hi, xr, xi, ar, ai, br, bi, wr, wi, vr, vi, LOW)
        for j in tl.static_range(KEPT):
            t = k * KEPT + (KEPT - 1 - j)
            there = t < stop
            live = both(in_d, there)
            counts = both(mask, there)
            pr, pi = real[KEPT - 1 - j], imaginary[KEPT - 1 - j]
            xr, xi = token(x, row * T + t, stride, plane, d, live, PLANES)
            yr, yi = token(dy, row * T + t, PLANES * H, H, d, live, PLANES)
            hr, hi, joined = advance(pr, pi, xr, xi, ar, ai, br, bi, wr, wi, vr, vi, LOW)
            er = tl.where(counts, gr + cr * yr[:, None] + ci * yi[:, None], 0.0)
            ei = tl.where(counts, gi + cr * yi[:, None] - ci * yr[:, None], 0.0)
            c_r += yr[:, None] * hr + yi[:, None] * hi
            c_i += yi[:, None] * hr - yr[:, None] * hi
            rate_r += er * pr + ei * pi
            rate_i += ei * pr - er * pi
            ur = er
            new_r = er + (ar * er + ai * ei)
            new_i = ei + (ar * ei - ai * er)
            if LOW:
                rho = tl.sum(wr * er + wi * ei, 1)
                ur = br * er + bi * ei
                b_r += er * xr[:, None]
                b_i += ei * xr[:, None]
                w_r -= er * joined[:, None]
                w_i -= ei * joined[:, None]
                v_r -= rho[:, None] * pr
                v_i += rho[:, None] * pi
                new_r -= rho[:, None] * vr
                new_i += rho[:, None] * vi
            out = tl.sum(ur, 1) + through * yr
            d_through += yr * xr
            tl.store(dx + (row * T + t) * PLANES * H + d, out.to(dx.dtype.element_ty), live)
            if PLANES == 2:
                out = tl.sum(ei, 1)
                tl.store(dx + ((row * T + t) * 2 + 1) * H + d, out.to(dx.dtype.element_ty), live)
            if reset is not None:
                again = tl.load(reset + row * T + t, there, 0) != 0
                new_r = tl.where(again, 0.0, new_r)
                new_i = tl.where(again, 0.0, new_i)
            gr = tl.where(counts, new_r, gr)
            gi = tl.where(counts, new_i, gi)
    store_pair(d_rate, whole + at, N, mask, rate_r, rate_i)
    store_pair(dc, whole + at, N, mask, c_r, c_i)
    if LOW:
        store_pair(db, whole + at, N, mask, b_r, b_i)
        store_pair(dw, whole + at, N, mask, w_r, w_i)
        store_pair(dv, whole + at, N, mask, v_r, v_i)
    tl.store(d_skip + row * H + d, d_through, in_d)
    store_pair(d_begin, whole + at, N, mask, gr, gi)


def config(rate: Tensor, states: int) -> dict[str, int]:
    """Channels and states of a program of `states` in all."""
    BN = power_of_2(rate.shape[2], 1)
    return {"BD": min(power_of_2(rate.shape[0], 1), max(1, states // BN)), "BN": BN}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x with all tokens evenly apart, its strides from token to token and of its planes."""
    if x.stride(-1) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1), x.stride(2) if x.dim() == 4 else 0


def _forward(
    x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None, v: Tensor | None, D: Tensor | None,
    initial_state: Tensor | None, reset: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, last = _forward_fake(x, rate, c, b, w, v, D, initial_state, reset, lengths)
    if lengths is not None:
        y.zero_()
    if not x.numel():
        return y, last.zero_() if initial_state is None else last.copy_(initial_state)
    x, stride, plane = _rows(x)
    rest = _contiguous(rate, c, b, w, v, D, reset, lengths)
    sizes = config(rate, 512)
    grid = (x.shape[0], triton.cdiv(rate.shape[0], sizes["BD"]))
    launch(
        forward_kernel, grid, x, *rest, y, *_contiguous(initial_state), last, x.shape[1], stride, plane, rate.shape[0],
        rate.shape[2], PLANES=x.dim() - 2, **sizes, num_warps=1,
    )  # fmt: skip
    return y, last


def _forward_fake(
    x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None, v: Tensor | None, D: Tensor | None,
    initial_state: Tensor | None, reset: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *rate.shape, dtype=torch.float32)


def _backward(
    dy: Tensor, d_last: Tensor, x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None,
    v: Tensor | None, D: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    results = _backward_fake(dy, d_last, x, rate, c, b, w, v, D, initial_state, reset, lengths)
    if not x.numel():
        for result in results:
            result.zero_()
        return *results[:-1], results[-1].copy_(d_last)
    dx, d_initial = results[0], results[-1]
    if lengths is not None:
        dx.zero_()
    x, stride, plane = _rows(x)
    (rows, tokens), (channels, _, states) = x.shape[:2], rate.shape

    def room(*shape: int) -> Tensor:
        return dy.new_empty(*shape, dtype=torch.float32)

    checked = triton.cdiv(tokens, KEEP)
    sums = [room(rows, *rate.shape) for _ in range(2 if b is None else 5)] + [None] * (3 if b is None else 0)
    d_skip = room(rows, channels)
    sizes = config(rate, 512)
    launch(
        backward_kernel, (rows, triton.cdiv(channels, sizes["BD"])), dy.contiguous(), x,
        *_contiguous(rate, c, b, w, v, D, reset, lengths, initial_state, d_last), room(rows, checked, *rate.shape), dx,
        *sums, d_skip, d_initial, tokens, checked, stride, plane, channels, states, PLANES=x.dim() - 2, **sizes,
        KEPT=KEEP, num_warps=8,
    )  # fmt: skip
    for result, found in zip(results[1:7], [*sums, d_skip], strict=True):
        if found is not None:
            result.copy_(found.sum(0))
    return results


def _backward_fake(
    dy: Tensor, d_last: Tensor, x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None,
    v: Tensor | None, D: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    db, dw, dv = (rate.new_empty(0) if z is None else z.new_empty(z.shape) for z in (b, w, v))
    d_skip = rate.new_empty(rate.shape[0]) if D is None else D.new_empty(D.shape)
    return (
        x.new_empty(x.shape), rate.new_empty(rate.shape), c.new_empty(c.shape), db, dw, dv, d_skip,
        d_last.new_empty(d_last.shape),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = BACKWARD(dy, d_last, *saved)
    return *(None if z is None else d.to(z.dtype) for z, d in zip(saved[:8], found, strict=True)), None, None


BACKWARD = Primitive("altx_s4::diagonal_ssm_triton_backward", _backward, _backward_fake, device=DEVICE)
FORWARD = Primitive(
    "altx_s4::diagonal_ssm_triton", _forward, _forward_fake, save=_save, backward=_differentiate, device=DEVICE
)


def run(
    x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None = None, w: Tensor | None = None, v: Tensor | None = None,
    D: Tensor | None = None, *, initial_state: Tensor | None = None, reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `diagonal_ssm.diagonal_ssm`; N up to 256, no float64."""
    y, last = FORWARD(x, rate, c, b, w, v, D, initial_state, reset, lengths)
    return y, last
