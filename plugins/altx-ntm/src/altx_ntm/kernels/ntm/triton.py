"""The NTM's time loop on a GPU: a program walks through one row, its memory in registers; any order, any heads.

As in native.py, the adjoint has the address after every token and the memory before every CHUNK-th, and computes those
between again. A program's addresses lie in memory, one head at a time in registers.
"""

# Where a constant decides, Triton compiles one branch, which takes an `if` of its own.
# ruff: noqa: SIM102
# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altx_kernels.gpu.launching import DEVICE, launch, power_of_2
from altx_kernels.primitive import Primitive
from altx_ntm.kernels.addressing import content, norms, softmax, uncontent
from altx_ntm.kernels.ntm import flat, reference
from altx_ntm.kernels.ntm.flat import Maybe
from altx_ntm.kernels.ntm.reference import Heads, Slots, Writes

EPS = tl.constexpr(reference.EPS)
FLOOR = tl.constexpr(reference.EPS**2)
CHUNK = 16
"""Tokens between two memories that are kept for the adjoint."""


@triton.jit
def rolled(x, by, n, N):
    """Slots on a circle, each moved by `by`, which is not more than there are slots either way."""
    source = n - by
    source = tl.where(source < 0, source + N, source)
    source = tl.where(source >= N, source - N, source)
    return tl.gather(x, tl.where(n < N, source, 0), 0)


@triton.jit
def look(M, inverse, key, strength, gate, shift, previous, i, n, w, N, W, S):
    """Equations (5) to (8) of head i: what `content` returns, and the address gated and shifted."""
    unit, scale, cosine, similar = content(M, inverse, key + i * W, tl.load(strength + i), FLOOR, n, w, N, W)
    g = tl.load(gate + i)
    gated = g * similar + (1 - g) * previous
    shifted = tl.zeros_like(gated) + EPS
    for j in range(S):
        shifted += tl.load(shift + i * S + j) * rolled(gated, j - S // 2, n, N)
    return unit, scale, cosine, similar, gated, shifted


@triton.jit
def moved(M, inverse, key, strength, gate, shift, sharpness, where, i, n, w, N, W, S):
    """Equations (5) to (9) of head i, whose address lies at `where`: the new one, which takes its place."""
    previous = tl.load(where + n, n < N, 0.0)
    _, _, _, _, _, shifted = look(M, inverse, key, strength, gate, shift, previous, i, n, w, N, W, S)
    address = softmax(tl.load(sharpness + i) * tl.log(shifted), n < N)
    # Every warp has what was there.
    tl.debug_barrier()
    tl.store(where + n, address, n < N)
    return address


@triton.jit
def kept_and_added(like, where, erase, add, i, n, w, N, W, V: tl.constexpr):
    """Equations (3) and (4): what a token's write heads, whose addresses lie at `where`, leave of M, and add to it."""
    keep = tl.full(like.shape, 1.0, tl.float32)
    added = tl.zeros_like(like)
    for v in range(V):
        a = tl.load(where + v * N + n, n < N, 0.0)[:, None]
        keep *= 1 - a * tl.load(erase + (i * V + v) * W + w, w < W, 0.0)[None, :]
        added += a * tl.load(add + (i * V + v) * W + w, w < W, 0.0)[None, :]
    return keep, added


@triton.jit
def written(
    M, where, write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add, i, n, w, N, W, S,
    V: tl.constexpr,
):  # fmt: skip
    inverse = norms(M, FLOOR)
    keep = tl.full(M.shape, 1.0, tl.float32)
    added = tl.zeros_like(M)
    for v in range(V):
        a = moved(
            M, inverse, write_key, write_strength, write_gate, write_shift, write_sharpness, where + v * N, i * V + v,
            n, w, N, W, S,
        )[:, None]  # fmt: skip
        keep *= 1 - a * tl.load(erase + (i * V + v) * W + w, w < W, 0.0)[None, :]
        added += a * tl.load(add + (i * V + v) * W + w, w < W, 0.0)[None, :]
    return M * keep + added


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    read_key, read_strength, read_gate, read_shift, read_sharpness,
    write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add,
    memory, where, fresh_memory, fresh, mask, reset, read, last, checkpoints, addresses,
    T, N, W, RS, VS, R: tl.constexpr, V: tl.constexpr, WRITE_FIRST: tl.constexpr, CHUNK: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    w = tl.arange(0, BW)
    at = n[:, None] * W + w[None, :]
    inside = (n < N)[:, None] & (w < W)[None, :]
    where += b * (R + V) * N
    M = tl.load(memory + b * N * W + at, inside, 0.0)
    for t in range(T):
        i = b * T + t
        if checkpoints is not None:
            if t % CHUNK == 0:
                tl.store(checkpoints + (b * tl.cdiv(T, CHUNK) + t // CHUNK) * N * W + at, M, inside)
        real = True
        if mask is not None:
            real = tl.load(mask + i) != 0
        if real:
            if reset is not None:
                if tl.load(reset + i) != 0:
                    M = tl.load(fresh_memory + b * N * W + at, inside, 0.0)
                    for h in range(R + V):
                        tl.store(where + h * N + n, tl.load(fresh + (b * (R + V) + h) * N + n, n < N, 0.0), n < N)
                    tl.debug_barrier()
            if WRITE_FIRST and V > 0:
                M = written(
                    M, where + R * N, write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add,
                    i, n, w, N, W, VS, V,
                )  # fmt: skip
            if R > 0:
                inverse = norms(M, FLOOR)
                for h in range(R):
                    a = moved(
                        M, inverse, read_key, read_strength, read_gate, read_shift, read_sharpness, where + h * N,
                        i * R + h, n, w, N, W, RS,
                    )  # fmt: skip
                    tl.store(read + (i * R + h) * W + w, tl.sum(a[:, None] * M, 0), w < W)
            if not WRITE_FIRST and V > 0:
                M = written(
                    M, where + R * N, write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add,
                    i, n, w, N, W, VS, V,
                )  # fmt: skip
            # Other threads may hold what these have stored.
            tl.debug_barrier()
        else:
            for h in range(R):
                tl.store(read + (i * R + h) * W + w, tl.zeros([BW], tl.float32), w < W)
        if addresses is not None:
            for h in range(R + V):
                tl.store(addresses + (i * (R + V) + h) * N + n, tl.load(where + h * N + n, n < N, 0.0), n < N)
    tl.store(last + b * N * W + at, M, inside)


@triton.jit
def unlook(
    dM, d_address, M, inverse, now, previous, key, strength, gate, shift, sharpness,
    d_key, d_strength, d_gate, d_shift, d_sharpness, d_where, i, n, w, N, W, S,
):  # fmt: skip
    """Equations (9) to (5) of head i: from the gradient of its new address to that of the old, at d_where, and of M."""
    unit, scale, cosine, similar, gated, shifted = look(
        M, inverse, key, strength, gate, shift, previous, i, n, w, N, W, S
    )
    d_logit = now * (d_address - tl.sum(now * d_address, 0))
    tl.store(d_sharpness + i, tl.sum(d_logit * tl.log(shifted), 0))
    d_shifted = d_logit * tl.load(sharpness + i) / shifted
    d_gated = tl.zeros_like(d_shifted)
    for j in range(S):
        by = j - S // 2
        tl.store(d_shift + i * S + j, tl.sum(d_shifted * rolled(gated, by, n, N), 0))
        d_gated += tl.load(shift + i * S + j) * rolled(d_shifted, -by, n, N)
    d_gated = tl.where(n < N, d_gated, 0.0)
    g = tl.load(gate + i)
    tl.store(d_gate + i, tl.sum(d_gated * (similar - previous), 0))
    # Every warp has what was there.
    tl.debug_barrier()
    tl.store(d_where + n, (1 - g) * d_gated, n < N)
    return uncontent(
        dM, g * d_gated, M, inverse, unit, scale, cosine, similar, tl.load(strength + i), d_key + i * W, d_strength + i,
        w, W,
    )  # fmt: skip


@triton.jit
def before(addresses, initial, fresh, reset, b, t, T, h, n, N, H: tl.constexpr):
    """The address of head h before token t."""
    i = b * T + t
    earlier = tl.load(addresses + (tl.maximum(i - 1, 0) * H + h) * N + n, n < N, 0.0)
    previous = tl.where(t > 0, earlier, tl.load(initial + (b * H + h) * N + n, n < N, 0.0))
    if reset is not None:
        starts = tl.load(reset + i) != 0
        previous = tl.where(starts, tl.load(fresh + (b * H + h) * N + n, n < N, 0.0), previous)
    return previous


@triton.jit
def unwrite(dM, M, where, erase, add, d_erase, d_add, d_where, i, n, w, N, W, V: tl.constexpr):
    """Equations (4) and (3): from the gradient of what was written to that of M; those of addresses are added up."""
    for v in range(V):
        a = tl.load(where + v * N + n, n < N, 0.0)
        e = tl.load(erase + (i * V + v) * W + w, w < W, 0.0)
        d = tl.load(add + (i * V + v) * W + w, w < W, 0.0)
        d_factor = dM * M
        for u in range(V):
            other = tl.load(where + u * N + n, n < N, 0.0)[:, None]
            left = 1 - other * tl.load(erase + (i * V + u) * W + w, w < W, 0.0)[None, :]
            d_factor *= tl.where(u == v, 1.0, left)
        tl.store(d_add + (i * V + v) * W + w, tl.sum(dM * a[:, None], 0), w < W)
        tl.store(d_erase + (i * V + v) * W + w, -tl.sum(d_factor * a[:, None], 0), w < W)
        through = tl.sum(dM * d[None, :] - d_factor * e[None, :], 1)
        tl.store(d_where + v * N + n, tl.load(d_where + v * N + n, n < N, 0.0) + through, n < N)
    tl.debug_barrier()
    keep, _ = kept_and_added(M, where, erase, add, i, n, w, N, W, V)
    return dM * keep


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    d_read, d_last, d_where, checkpoints, addresses,
    read_key, read_strength, read_gate, read_shift, read_sharpness,
    write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add,
    initial, fresh_memory, fresh, mask, reset,
    d_read_key, d_read_strength, d_read_gate, d_read_shift, d_read_sharpness,
    d_write_key, d_write_strength, d_write_gate, d_write_shift, d_write_sharpness, d_erase, d_add,
    d_memory, d_fresh_memory, d_fresh, memories,
    T, N, W, RS, VS, R: tl.constexpr, V: tl.constexpr, WRITE_FIRST: tl.constexpr, CHUNK: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    w = tl.arange(0, BW)
    H: tl.constexpr = R + V
    at = n[:, None] * W + w[None, :]
    inside = (n < N)[:, None] & (w < W)[None, :]
    d_where += b * H * N
    memories += b * CHUNK * N * W
    dM = tl.zeros([BN, BW], tl.float32)
    if d_last is not None:
        dM = tl.load(d_last + b * N * W + at, inside, 0.0)
    chunks = tl.cdiv(T, CHUNK)
    for c in range(chunks):
        start = (chunks - 1 - c) * CHUNK
        stop = tl.minimum(start + CHUNK, T)
        M = tl.load(checkpoints + (b * chunks + chunks - 1 - c) * N * W + at, inside, 0.0)
        for t in range(start, stop):
            i = b * T + t
            real = True
            if mask is not None:
                real = tl.load(mask + i) != 0
            if real:
                if reset is not None:
                    if tl.load(reset + i) != 0:
                        M = tl.load(fresh_memory + b * N * W + at, inside, 0.0)
                tl.store(memories + (t - start) * N * W + at, M, inside)
                if V > 0:
                    keep, added = kept_and_added(M, addresses + (i * H + R) * N, erase, add, i, n, w, N, W, V)
                    M = M * keep + added
        tl.debug_barrier()
        for s in range(stop - start):
            t = stop - 1 - s
            i = b * T + t
            now = addresses + i * H * N
            real = True
            if mask is not None:
                real = tl.load(mask + i) != 0
            if real:
                M = tl.load(memories + (t - start) * N * W + at, inside, 0.0)
                if WRITE_FIRST and V > 0:
                    keep, added = kept_and_added(M, now + R * N, erase, add, i, n, w, N, W, V)
                    M = M * keep + added
                elif V > 0:
                    dM = unwrite(
                        dM, M, now + R * N, erase, add, d_erase, d_add, d_where + R * N, i, n, w, N, W, V
                    )  # fmt: skip
                inverse = norms(M, FLOOR)
                for h in range(R):
                    a = tl.load(now + h * N + n, n < N, 0.0)
                    d_address = tl.load(d_where + h * N + n, n < N, 0.0)
                    if d_read is not None:
                        vector = tl.load(d_read + (i * R + h) * W + w, w < W, 0.0)[None, :]
                        d_address += tl.sum(M * vector, 1)
                        dM += a[:, None] * vector
                    dM = unlook(
                        dM, d_address, M, inverse, a, before(addresses, initial, fresh, reset, b, t, T, h, n, N, H),
                        read_key, read_strength, read_gate, read_shift, read_sharpness, d_read_key, d_read_strength,
                        d_read_gate, d_read_shift, d_read_sharpness, d_where + h * N, i * R + h, n, w, N, W, RS,
                    )  # fmt: skip
                if WRITE_FIRST and V > 0:
                    M = tl.load(memories + (t - start) * N * W + at, inside, 0.0)
                    dM = unwrite(
                        dM, M, now + R * N, erase, add, d_erase, d_add, d_where + R * N, i, n, w, N, W, V
                    )  # fmt: skip
                    inverse = norms(M, FLOOR)
                for v in range(V):
                    a = tl.load(now + (R + v) * N + n, n < N, 0.0)
                    d_address = tl.load(d_where + (R + v) * N + n, n < N, 0.0)
                    dM = unlook(
                        dM, d_address, M, inverse, a, before(addresses, initial, fresh, reset, b, t, T, R + v, n, N, H),
                        write_key, write_strength, write_gate, write_shift, write_sharpness, d_write_key,
                        d_write_strength, d_write_gate, d_write_shift, d_write_sharpness, d_where + (R + v) * N,
                        i * V + v, n, w, N, W, VS,
                    )  # fmt: skip
                tl.debug_barrier()
                if reset is not None:
                    if tl.load(reset + i) != 0:
                        there = d_fresh_memory + b * N * W + at
                        tl.store(there, tl.load(there, inside, 0.0) + dM, inside)
                        dM = tl.zeros([BN, BW], tl.float32)
                        for h in range(H):
                            cut = d_fresh + (b * H + h) * N + n
                            d_address = tl.load(d_where + h * N + n, n < N, 0.0)
                            tl.store(cut, tl.load(cut, n < N, 0.0) + d_address, n < N)
                            tl.store(d_where + h * N + n, tl.zeros([BN], tl.float32), n < N)
                        tl.debug_barrier()
    tl.store(d_memory + b * N * W + at, dM, inside)


def _options(slots: int, width: int) -> dict[str, Any]:
    """Blocks, and warps so that a thread holds 32 numbers of a memory at most."""
    across, down = power_of_2(width), power_of_2(slots)
    return {"CHUNK": CHUNK, "BN": down, "BW": across, "num_warps": max(1, min(8, across * down // 512))}


def _forward(
    read_key: Tensor | None, read_strength: Tensor | None, read_gate: Tensor | None, read_shift: Tensor | None,
    read_sharpness: Tensor | None, write_key: Tensor | None, write_strength: Tensor | None, write_gate: Tensor | None,
    write_shift: Tensor | None, write_sharpness: Tensor | None, erase: Tensor | None, add: Tensor | None,
    memory: Tensor, read_address: Tensor, write_address: Tensor,
    fresh_memory: Tensor | None, fresh_read_address: Tensor | None, fresh_write_address: Tensor | None,
    mask: Tensor | None, reset: Tensor | None, write_first: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What was read, the slots after, and for the adjoint, else empty: checkpoints and addresses."""
    parameters = [
        read_key, read_strength, read_gate, read_shift, read_sharpness,
        write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add,
    ]  # fmt: skip
    results = _results(parameters, memory, read_address, write_address, save)
    _, tokens, slots, width, readers, writers, *shifts = flat.sizes(parameters, memory)
    where = torch.cat([read_address, write_address], 1)
    launch(
        forward_kernel, (len(memory),), *map(flat.dense, [*parameters, memory]), where,
        *map(flat.dense, (fresh_memory, flat.joined(fresh_read_address, fresh_write_address), mask, reset)),
        *results[:2], *(results[4:] if save else (None, None)), tokens, slots, width, *shifts,
        R=readers, V=writers, WRITE_FIRST=write_first, **_options(slots, width),
    )  # fmt: skip
    results[2].copy_(where[:, :readers])
    results[3].copy_(where[:, readers:])
    return results


def _results(
    parameters: list[Maybe], memory: Tensor, read_address: Tensor, write_address: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns."""
    tokens, slots, width = flat.sizes(parameters, memory)[1:4]
    kept = (-(-tokens // CHUNK), slots, width) if save else None
    return flat.results(parameters, memory, read_address, write_address, kept)


def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    memory, read_address, write_address = inputs[12:15]
    return _results(list(inputs[:12]), memory, read_address, write_address, inputs[-1])


def _backward(
    d_read: Tensor | None, d_memory: Tensor | None, d_read_address: Tensor | None, d_write_address: Tensor | None,
    checkpoints: Tensor, addresses: Tensor,
    read_key: Tensor | None, read_strength: Tensor | None, read_gate: Tensor | None, read_shift: Tensor | None,
    read_sharpness: Tensor | None, write_key: Tensor | None, write_strength: Tensor | None, write_gate: Tensor | None,
    write_shift: Tensor | None, write_sharpness: Tensor | None, erase: Tensor | None, add: Tensor | None,
    read_address: Tensor, write_address: Tensor,
    fresh_memory: Tensor | None, fresh_read_address: Tensor | None, fresh_write_address: Tensor | None,
    mask: Tensor | None, reset: Tensor | None, write_first: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the first 18 arguments of `_forward`, empty where there is none."""
    parameters = [
        read_key, read_strength, read_gate, read_shift, read_sharpness,
        write_key, write_strength, write_gate, write_shift, write_sharpness, erase, add,
    ]  # fmt: skip
    width = checkpoints.shape[3]
    gradients = flat.gradients(parameters, checkpoints, read_address, write_address, width, mask is not None)
    _, tokens, slots, _, readers, writers, *shifts = flat.sizes(parameters, gradients[12])
    d_where = torch.cat(
        [
            torch.zeros_like(address) if d is None else d
            for address, d in ((read_address, d_read_address), (write_address, d_write_address))
        ],
        1,
    )
    d_fresh = torch.zeros_like(d_where)
    gradients[15].zero_()
    launch(
        backward_kernel, (len(checkpoints),), *map(flat.dense, (d_read, d_memory)), d_where, checkpoints, addresses,
        *map(flat.dense, parameters), torch.cat([read_address, write_address], 1),
        *map(flat.dense, (fresh_memory, flat.joined(fresh_read_address, fresh_write_address), mask, reset)),
        *gradients[:13], gradients[15], d_fresh, checkpoints.new_empty(len(checkpoints), CHUNK, slots, width),
        tokens, slots, width, *shifts, R=readers, V=writers, WRITE_FIRST=write_first, **_options(slots, width),
    )  # fmt: skip
    for given, place in ((d_where, 13), (d_fresh, 16)):
        gradients[place].copy_(given[:, :readers])
        gradients[place + 1].copy_(given[:, readers:])
    return gradients


def _fake_backward(*inputs: Any) -> list[Tensor]:
    return flat.gradients(list(inputs[6:18]), inputs[4], inputs[18], inputs[19], inputs[4].shape[3], False)


BACKWARD = Primitive("altx_ntm::scan_triton_backward", _backward, _fake_backward, device=DEVICE)
FORWARD = Primitive(
    "altx_ntm::scan_triton", _forward, _fake, save=flat.save, backward=flat.differentiate(BACKWARD), keep="save",
    device=DEVICE,
)  # fmt: skip
flat.count_flops(torch.ops.altx_ntm.scan_triton)


def run(
    slots: Slots,
    fresh: Slots,
    reads: Heads | None,
    writes: Writes | None,
    *,
    write_first: bool = False,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Slots]:
    """As `reference.scan`."""
    return flat.scan(FORWARD, slots, fresh, reads, writes, write_first, mask, reset)
