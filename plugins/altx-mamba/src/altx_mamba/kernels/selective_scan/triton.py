"""The selective scan on a GPU: a program keeps the states of a block of channels in registers, token after token.

Where sequences times channels are too few for the GPU, the sequences are cut into segments: what each adds to the
state, a scan over that, the outputs. A segment's decay is exp(A times its sum of dt').

The gradient walks through a segment once forwards, writing the state down every few tokens, and once backwards,
recomputing the states between from that. It is summed over channels (for B, C) and over segments (for A, D, dt_bias)
in a fixed order.
"""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.common import LOG2E, carry, piece, sigmoid
from altx_kernels.gpu.common import softplus as soft
from altx_kernels.gpu.launching import DEVICE, Pieces, cut, launch, power_of_2, rows, segment
from altx_kernels.primitive import Primitive

# Tokens between two states that the gradient writes down.
KEEP = 8


@triton.jit
def both(mask, there):
    """`mask` where the token is there. The interpreter joins a block's mask with another block's only."""
    return mask & (tl.zeros(mask.shape, tl.int32) + there.to(tl.int32) != 0)


@triton.jit
def step_size(dt, bias, t, sdt, d, in_d, SOFTPLUS: tl.constexpr):
    """dt' of a token and what it is taken of; beyond the end a token holds the state."""
    raw = tl.load(dt + t * sdt + d, in_d, 0.0).to(tl.float32) + bias
    value = raw
    if SOFTPLUS:
        value = soft(raw)
    return tl.where(in_d, value, 0.0), raw


@triton.jit
def channel(pointer, d, in_d):
    """A number per channel; 0 if there is none."""
    value = d.to(tl.float32) * 0
    if pointer is not None:
        value = tl.load(pointer + d, in_d, 0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["T", "L"])
def scan_kernel(
    x, dt, A, B, C, skip, z, dt_bias, reset, y, begin, end, decays, table, T, L, sx, sdt, sb, sc, sz, D, N,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, OUT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Walk through a piece: write y if OUT, else the piece's own decay; and the state after it."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d = d < D
    in_n = n < N
    in_state = in_d[:, None] & in_n[None, :]
    at_state = d[:, None] * N + n[None, :]
    _, start, stop = piece(i, table, T, L, PACKED)
    a_log = tl.load(A + at_state, in_state, 0.0).to(tl.float32) * LOG2E
    bias = channel(dt_bias, d, in_d)
    through = channel(skip, d, in_d)
    h = tl.zeros([BD, BN], tl.float32)
    if begin is not None:
        h = tl.load(begin + i * D * N + at_state, in_state, 0.0).to(tl.float32)
    time = tl.zeros([BD], tl.float32)
    wiped = 0
    for step in tl.range(0, (stop - start).to(tl.int32), num_stages=3):
        t = start + step
        step_dt, _raw = step_size(dt, bias, t, sdt, d, in_d, SOFTPLUS)
        xt = tl.load(x + t * sx + d, in_d, 0.0).to(tl.float32)
        Bt = tl.load(B + t * sb + n, in_n, 0.0).to(tl.float32)
        if reset is not None:
            again = tl.load(reset + t) != 0
            h = tl.where(again, 0.0, h)
            wiped += again.to(tl.int32)
        h = tl.exp2(step_dt[:, None] * a_log) * h + (step_dt * xt)[:, None] * Bt[None, :]
        time += step_dt
        if OUT:
            Ct = tl.load(C + t * sc + n, in_n, 0.0).to(tl.float32)
            yt = tl.sum(h * Ct[None, :], 1) + through * xt
            if z is not None:
                zt = tl.load(z + t * sz + d, in_d, 0.0).to(tl.float32)
                yt *= zt * sigmoid(zt)
            tl.store(y + t * D + d, yt.to(y.dtype.element_ty), in_d)
    if end is not None:
        tl.store(end + i * D * N + at_state, h, in_state)
    if not OUT:
        log_decay = tl.where(wiped == 0, time[:, None] * (a_log / LOG2E), float("-inf"))
        tl.store(decays + i * D * N + at_state, log_decay, in_state)


@triton.jit
def output_gradient(dy, z, t, sz, D, d, in_d):
    """The gradient of what the gate multiplies."""
    value = tl.load(dy + t * D + d, in_d, 0.0).to(tl.float32)
    if z is not None:
        zt = tl.load(z + t * sz + d, in_d, 0.0).to(tl.float32)
        value *= zt * sigmoid(zt)
    return value


@triton.jit(do_not_specialize=["T", "L"])
def future_kernel(
    dy, dt, A, C, z, dt_bias, reset, end, decays, table, T, L, sdt, sc, sz, D, N,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What a piece's outputs add to the gradient of the state before it, and the piece's decay."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d = d < D
    in_state = in_d[:, None] & (n < N)[None, :]
    at_state = d[:, None] * N + n[None, :]
    _, start, stop = piece(i, table, T, L, PACKED)
    a_log = tl.load(A + at_state, in_state, 0.0).to(tl.float32) * LOG2E
    bias = channel(dt_bias, d, in_d)
    E = tl.zeros([BD, BN], tl.float32)
    time = tl.zeros([BD], tl.float32)
    wiped = 0
    for step in tl.range(0, (stop - start).to(tl.int32), num_stages=3):
        t = stop - 1 - step
        step_dt, _raw = step_size(dt, bias, t, sdt, d, in_d, SOFTPLUS)
        Ct = tl.load(C + t * sc + n, n < N, 0.0).to(tl.float32)
        E += output_gradient(dy, z, t, sz, D, d, in_d)[:, None] * Ct[None, :]
        E *= tl.exp2(step_dt[:, None] * a_log)
        if reset is not None:
            again = tl.load(reset + t) != 0
            E = tl.where(again, 0.0, E)
            wiped += again.to(tl.int32)
        time += step_dt
    tl.store(end + i * D * N + at_state, E, in_state)
    log_decay = tl.where(wiped == 0, time[:, None] * (a_log / LOG2E), float("-inf"))
    tl.store(decays + i * D * N + at_state, log_decay, in_state)


@triton.jit(do_not_specialize=["T", "L", "tokens"])
def backward_kernel(
    dy, x, dt, A, B, C, skip, z, dt_bias, reset, begin, d_end, checks, dx, d_dt, dA, dB, dC, d_skip, dz, d_bias,
    d_begin, table, T, L, tokens, sx, sdt, sb, sc, sz, D, N,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d = d < D
    in_n = n < N
    in_state = in_d[:, None] & in_n[None, :]
    at_state = d[:, None] * N + n[None, :]
    _, start, stop = piece(i, table, T, L, PACKED)
    A_block = tl.load(A + at_state, in_state, 0.0).to(tl.float32)
    a_log = A_block * LOG2E
    bias = channel(dt_bias, d, in_d)
    through = channel(skip, d, in_d)
    # Room for a piece's states: what all before it may need.
    check = checks + (start // KEPT + i) * D * N + at_state
    h = tl.zeros([BD, BN], tl.float32)
    if begin is not None:
        h = tl.load(begin + i * D * N + at_state, in_state, 0.0).to(tl.float32)
    number = tl.cdiv(stop - start, KEPT)
    for c in range(number):
        tl.store(check + c * D * N, h, in_state)
        for j in tl.static_range(KEPT):
            t = start + c * KEPT + j
            there = t < stop
            live = both(in_d, there)
            step_dt, _raw = step_size(dt, bias, t, sdt, d, live, SOFTPLUS)
            xt = tl.load(x + t * sx + d, live, 0.0).to(tl.float32)
            Bt = tl.load(B + t * sb + n, both(in_n, there), 0.0).to(tl.float32)
            if reset is not None:
                h = tl.where(tl.load(reset + t, there, 0) != 0, 0.0, h)
            h = tl.exp2(step_dt[:, None] * a_log) * h + (step_dt * xt)[:, None] * Bt[None, :]
    tl.debug_barrier()

    E = tl.load(d_end + i * D * N + at_state, in_state, 0.0).to(tl.float32)
    dA_block = tl.zeros([BD, BN], tl.float32)
    d_through = tl.zeros([BD], tl.float32)
    d_bias_block = tl.zeros([BD], tl.float32)
    for back in range(number):
        c = number - 1 - back
        h = tl.load(check + c * D * N, in_state, 0.0)
        before = ()
        for j in tl.static_range(KEPT):
            t = start + c * KEPT + j
            there = t < stop
            live = both(in_d, there)
            step_dt, _raw = step_size(dt, bias, t, sdt, d, live, SOFTPLUS)
            xt = tl.load(x + t * sx + d, live, 0.0).to(tl.float32)
            Bt = tl.load(B + t * sb + n, both(in_n, there), 0.0).to(tl.float32)
            if reset is not None:
                h = tl.where(tl.load(reset + t, there, 0) != 0, 0.0, h)
            before = before + (h,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no star)
            h = tl.exp2(step_dt[:, None] * a_log) * h + (step_dt * xt)[:, None] * Bt[None, :]
        for j in tl.static_range(KEPT):
            t = start + c * KEPT + (KEPT - 1 - j)
            there = t < stop
            live = both(in_d, there)
            step_dt, raw = step_size(dt, bias, t, sdt, d, live, SOFTPLUS)
            xt = tl.load(x + t * sx + d, live, 0.0).to(tl.float32)
            Bt = tl.load(B + t * sb + n, both(in_n, there), 0.0).to(tl.float32)
            Ct = tl.load(C + t * sc + n, both(in_n, there), 0.0).to(tl.float32)
            decay = tl.exp2(step_dt[:, None] * a_log)
            past = decay * before[KEPT - 1 - j]
            h = past + (step_dt * xt)[:, None] * Bt[None, :]
            d_out = output_gradient(dy, z, t, sz, D, d, live)
            if z is not None:
                zt = tl.load(z + t * sz + d, live, 0.0).to(tl.float32)
                gate = sigmoid(zt)
                read = tl.sum(h * Ct[None, :], 1) + through * xt
                given = tl.load(dy + t * D + d, live, 0.0).to(tl.float32)
                d_gate = given * read * gate * (1 + zt * (1 - gate))
                tl.store(dz + t * D + d, d_gate.to(dz.dtype.element_ty), live)
            E += d_out[:, None] * Ct[None, :]
            at_n = (block * tokens + t) * N + n
            tl.store(dC + at_n, tl.sum(d_out[:, None] * h, 0), both(in_n, there))
            tl.store(dB + at_n, tl.sum(E * (step_dt * xt)[:, None], 0), both(in_n, there))
            read_B = tl.sum(E * Bt[None, :], 1)
            tl.store(dx + t * D + d, (through * d_out + step_dt * read_B).to(dx.dtype.element_ty), live)
            change = E * past
            d_step = tl.sum(change * A_block, 1) + xt * read_B
            if SOFTPLUS:
                d_step *= sigmoid(raw)
            d_step = tl.where(live, d_step, 0.0)
            tl.store(d_dt + t * D + d, d_step.to(d_dt.dtype.element_ty), live)
            dA_block += change * step_dt[:, None]
            d_through += d_out * xt
            d_bias_block += d_step
            E *= decay
            if reset is not None:
                E = tl.where(tl.load(reset + t, there, 0) != 0, 0.0, E)
    tl.store(dA + i * D * N + at_state, dA_block, in_state)
    tl.store(d_skip + i * D + d, d_through, in_d)
    tl.store(d_bias + i * D + d, d_bias_block, in_d)
    if d_begin is not None:
        tl.store(d_begin + i * D * N + at_state, E, in_state)


def config(D: int, N: int) -> dict[str, int]:
    """Channels and states of a program: 512 states, 16 a lane of one warp."""
    BN = power_of_2(N, 1)
    return {"BD": min(power_of_2(D, 1), max(1, 512 // BN)), "BN": BN}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _pieces(x: Tensor, cu_seqlens: Tensor | None, D: int, N: int) -> tuple[Pieces, int, bool]:
    """The pieces, how many blocks of channels there are, and whether the sequences are split."""
    blocks = triton.cdiv(D, config(D, N)["BD"])
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    # Programs of one warp: four of them occupy as much as one of the others.
    length = segment(x, x.shape[1], triton.cdiv(sequences * blocks, 4), 4 * KEEP)
    return cut(x, cu_seqlens, length), blocks, length is not None


def _begins(
    pieces: Pieces, grid: tuple[int, ...], tensors: tuple[Any, ...], strides: tuple[int, ...], state: Tensor | None,
    final: Tensor, flags: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The state that each piece of a split sequence begins with; `final` receives the last."""
    x, _, A = tensors[:3]
    states: Tensor = x.new_empty(pieces.count, *A.shape, dtype=torch.float32)
    decays = torch.empty_like(states)
    launch(
        scan_kernel, grid, *tensors, None, None, states, decays, pieces.table, pieces.tokens, pieces.length, *strides,
        *A.shape, OUT=False, **flags,
    )  # fmt: skip
    carry(pieces, states, decays, state, final, inner=1, mod=A.numel(), outer=A.numel())
    return states


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, initial_state: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, final = _forward_fake(x, dt, A, B, C, D, z, dt_bias, softplus, initial_state, reset, cu_seqlens)
    if not y.numel():
        return y, final.zero_() if initial_state is None else final.copy_(initial_state)
    x, dt, B, C = (rows(v) for v in (x, dt, B, C))
    z, A = None if z is None else rows(z), A.contiguous()
    D, dt_bias, initial_state, reset = _contiguous(D, dt_bias, initial_state, reset)
    pieces, blocks, split = _pieces(x, cu_seqlens, *A.shape)
    grid, strides = (pieces.count, blocks), tuple(0 if v is None else v.stride(1) for v in (x, dt, B, C, z))
    flags = {"SOFTPLUS": softplus, "PACKED": cu_seqlens is not None, **config(*A.shape), "num_warps": 1}
    begin = initial_state
    if split:
        inputs = (x, dt, A, B, C, D, z, dt_bias, reset)
        begin = _begins(pieces, grid, inputs, strides, initial_state, final, flags)
    launch(
        scan_kernel, grid, x, dt, A, B, C, D, z, dt_bias, reset, y, begin, None if split else final, None, pieces.table,
        pieces.tokens, pieces.length, *strides, *A.shape, OUT=True, **flags,
    )  # fmt: skip
    return y, final


def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, initial_state: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, *A.shape, dtype=torch.float32)


def _backward(
    dy: Tensor, d_final: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    saved = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    results = _backward_fake(dy, d_final, *saved, reset, cu_seqlens, softplus)
    if not x.numel():
        for result in results:
            result.zero_()
        return *results[:-1], results[-1].copy_(d_final)
    dx, d_dt, dz, d_initial = results[0], results[1], results[6], results[8]
    x, dt, B, C = (rows(v) for v in (x, dt, B, C))
    z, A = None if z is None else rows(z), A.contiguous()
    D, dt_bias, initial_state, reset = _contiguous(D, dt_bias, initial_state, reset)
    dy, d_final = dy.contiguous(), d_final.contiguous()
    pieces, blocks, split = _pieces(x, cu_seqlens, *A.shape)
    grid, strides = (pieces.count, blocks), tuple(0 if v is None else v.stride(1) for v in (x, dt, B, C, z))
    flags = {"SOFTPLUS": softplus, "PACKED": cu_seqlens is not None, **config(*A.shape)}
    tokens, (channels, N) = x.shape[0] * x.shape[1], A.shape
    begin, d_end = initial_state, d_final
    if split:
        unused = torch.empty_like(d_final)
        inputs = (x, dt, A, B, C, D, z, dt_bias, reset)
        begin = _begins(pieces, grid, inputs, strides, initial_state, unused, {**flags, "num_warps": 1})
        d_end = torch.empty_like(begin)
        decays = torch.empty_like(begin)
        launch(
            future_kernel, grid, dy, dt, A, C, z, dt_bias, reset, d_end, decays, pieces.table, pieces.tokens,
            pieces.length, strides[1], *strides[3:], *A.shape, **flags, num_warps=1,
        )  # fmt: skip
        carry(pieces, d_end, decays, d_final, d_initial, inner=1, mod=A.numel(), outer=A.numel(), reverse=True)

    def room(*shape: int) -> Tensor:
        return dy.new_empty(*shape, dtype=torch.float32)

    checks = room(tokens // KEEP + pieces.count + 1, channels, N)
    dA, d_skip, d_bias = room(pieces.count, channels, N), room(pieces.count, channels), room(pieces.count, channels)
    dB, dC = (room(blocks, *B.shape) for _ in range(2))
    launch(
        backward_kernel, grid, dy, x, dt, A, B, C, D, z, dt_bias, reset, begin, d_end, checks, dx, d_dt, dA, dB, dC,
        d_skip, dz, d_bias, None if split else d_initial, pieces.table, pieces.tokens, pieces.length, tokens, *strides,
        *A.shape, **flags, KEPT=KEEP, num_warps=8,
    )  # fmt: skip
    sums = dA.sum(0), dB.sum(0), dC.sum(0), d_skip.sum(0), d_bias.sum(0)
    of_A, of_B, of_C, of_D, of_bias = (
        s.to(results[i].dtype) for s, i in zip(sums, (2, 3, 4, 5, 7), strict=True)
    )  # fmt: skip
    return dx, d_dt, of_A, of_B, of_C, of_D, dz, of_bias, d_initial


def _backward_fake(
    dy: Tensor, d_final: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    cu_seqlens: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_skip, d_bias = (x.new_empty(x.shape[2], dtype=x.dtype if v is None else v.dtype) for v in (D, dt_bias))
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    dx, d_dt, dA, dB, dC = (v.new_empty(v.shape) for v in (x, dt, A, B, C))
    return dx, d_dt, dA, dB, dC, d_skip, dz, d_bias, d_final.new_empty(d_final.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.softplus = inputs[8]
    ctx.save_for_backward(*inputs[:8], *inputs[9:])


def _differentiate(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = BACKWARD(dy, d_final, *saved, ctx.softplus)
    given = [None if x is None else d.to(x.dtype) for x, d in zip(saved[:9], found, strict=True)]
    return *given[:8], None, given[8], None, None


BACKWARD = Primitive("altx_mamba::selective_scan_triton_backward", _backward, _backward_fake, device=DEVICE)
FORWARD = Primitive(
    "altx_mamba::selective_scan_triton", _forward, _forward_fake, save=_save, backward=_differentiate, device=DEVICE
)


def run(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, *, softplus: bool = False, initial_state: Tensor | None = None,
    reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `selective_scan.selective_scan`; N up to 256, no float64."""
    y, final = FORWARD(x, dt, A, B, C, D, z, dt_bias, softplus, initial_state, reset, cu_seqlens)
    return y, final
