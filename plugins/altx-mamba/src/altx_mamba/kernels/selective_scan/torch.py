"""The selective scan in PyTorch, chunk by chunk: what runs anywhere without a compiled kernel.

A chunk's decays exp(dt A) and inputs dt B x are computed at once; then one fused multiply-add per token
turns the inputs into states, in place. Only the state at each chunk's start is kept for the backward pass,
which computes a chunk's decays and states again and runs the same recurrence from the end. So the
(B, T, D, N) states never exist as a whole, and no exponential of a positive number is taken.

Letters as in `reference`, and L tokens in a chunk. Inside, time comes first and N before D, because the
multiply-adds then run over contiguous memory: a chunk's states are (L, B, N, D), and A is (N, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast
from altx_kernels.packing import one_by_one

CHUNK = 32
"""Tokens in a chunk. On a CPU 16 takes as long and keeps twice the states; 64 outgrows the cache."""

SMALLEST = -80.0
"""Least exponent: exp(-80) = 2e-35 is nothing in a sum, and CPUs are 100 times slower where exp underflows."""


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    softplus: bool = False,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `selective_scan.selective_scan`."""
    if cu_seqlens is not None:
        per_token = {"x": x, "dt": dt, "B": B, "C": C, "z": z, "reset": reset}
        return one_by_one(
            selective_scan, cu_seqlens, per_token, initial_state, A=A, D=D, dt_bias=dt_bias, softplus=softplus
        )
    dtype, out = precise(x, dt, A, B, C, D, z, dt_bias, initial_state), x.dtype
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    if x.shape[1] == 1:
        y, h = _step(x, dt, A, B, C, h, reset)
    else:
        y, h = _Scan.apply(x, dt, A, B, C, h, reset)  # type: ignore[no-untyped-call]
    if D is not None:
        y = torch.addcmul(y, x, D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out), h


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token."""
    if reset is not None:
        h = h.masked_fill(reset[:, :, None], 0)
    h = torch.addcmul((dt * x)[:, 0, :, None] * B, torch.exp(dt[:, 0, :, None] * A), h)
    return (h * C).sum(-1)[:, None], h


class _Scan(torch.autograd.Function):
    """Any number of tokens; all tensors of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        A_, h = A.T.contiguous(), h.mT.clone(memory_format=torch.contiguous_format)
        y, starts = torch.empty_like(x), []
        decay_buffer, state_buffer = _buffers(2, x, A)
        with no_autocast(x.device):
            for now in _chunks(x):
                starts.append(h)
                x_, dt_, B_, C_ = _time_first(now, x, dt, B, C)
                fresh = None if reset is None else reset[:, now].T[..., None, None]
                decay = _decay(dt_, A_, decay_buffer)
                states = _states(dt_ * x_, B_, decay, h, fresh, state_buffer)
                y[:, now] = _over_states(states, C_).transpose(0, 1)
                h = states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, reset, *starts)
        return y, h.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, reset, *starts = ctx.saved_tensors
        A_, dh = A.T.contiguous(), dh.mT.contiguous()
        dx, ddt, dA, dB, dC = (torch.empty_like(tensor) for tensor in (x, dt, A_, B, C))
        dA.zero_()
        decay_buffer, state_buffer, grad_buffer = _buffers(3, x, A)
        with no_autocast(x.device):
            for now, h in zip(reversed(_chunks(x)), reversed(starts), strict=True):
                x_, dt_, B_, C_, dy_ = _time_first(now, x, dt, B, C, dy)
                fresh = None if reset is None else reset[:, now].T[..., None, None]
                u_ = dt_ * x_
                decay = _decay(dt_, A_, decay_buffer)
                states = _states(u_, B_, decay, h, fresh, state_buffer)
                # dL/dh_t = C_t dy_t + decay_{t+1} dL/dh_{t+1}: the forward recurrence from the end.
                grads = torch.mul(C_[..., None], dy_[:, :, None], out=grad_buffer[: len(decay)])
                grads[-1] += dh
                later = None if fresh is None else fresh.unbind(0)[:0:-1]
                _recur(decay.unbind(0)[:0:-1], grads.unbind(0)[-2::-1], grads[-1], later)
                dC[:, now] = _over_channels(states, dy_).transpose(0, 1)
                dB[:, now] = _over_channels(grads, u_).transpose(0, 1)
                du_ = _over_states(grads, B_)
                # Where the decay was, the gradient of its exponent dt A: decay_t h_{t-1} dL/dh_t.
                exponent = decay.mul_(grads)
                if fresh is not None:
                    exponent.masked_fill_(fresh, 0)
                dh = exponent[0].clone()
                exponent[1:].mul_(states[:-1])
                exponent[0].mul_(h)
                if fresh is not None:  # whatever was before, NaN included
                    exponent.masked_fill_(fresh, 0)
                scratch = state_buffer[: len(decay)]
                ddt_ = torch.mul(exponent, A_, out=scratch).sum(2)
                dA += torch.mul(exponent, dt_[:, :, None], out=scratch).sum((0, 1))
                dx[:, now] = (du_ * dt_).transpose(0, 1)
                ddt[:, now] = ddt_.addcmul_(du_, x_).transpose(0, 1)
        return dx, ddt, dA.T, dB, dC, dh.mT, None


def _chunks(x: Tensor) -> list[slice]:
    """Where the chunks of x (B, T, D) are."""
    return [slice(start, min(start + CHUNK, x.shape[1])) for start in range(0, x.shape[1], CHUNK)]


def _buffers(n: int, x: Tensor, A: Tensor) -> Tensor:
    """Room for n times a chunk's states, allocated once because fresh memory costs a CPU more than the sums."""
    batch, length, dim = x.shape
    return x.new_empty(n, min(CHUNK, length), batch, A.shape[1], dim)


def _time_first(now: slice, *tensors: Tensor) -> list[Tensor]:
    """A chunk of each (B, T, ...) as (L, B, ...)."""
    return [tensor[:, now].transpose(0, 1) for tensor in tensors]


def _decay(dt: Tensor, A: Tensor, buffer: Tensor) -> Tensor:
    """exp(dt A): (L, B, N, D)."""
    return torch.mul(dt[:, :, None], A, out=buffer[: len(dt)]).clamp_(min=SMALLEST).exp_()


def _states(u: Tensor, B: Tensor, decay: Tensor, h: Tensor, fresh: Tensor | None, buffer: Tensor) -> Tensor:
    """The states of a chunk, from u = dt x and the state h before it, none where `fresh`: (L, B, N, D)."""
    states = torch.mul(u[:, :, None], B[..., None], out=buffer[: len(u)])
    _recur(decay.unbind(0), states.unbind(0), h, None if fresh is None else fresh.unbind(0))
    return states


def _recur(decays: Sequence[Tensor], values: Sequence[Tensor], h: Tensor, fresh: Sequence[Tensor] | None) -> None:
    """value <- value + decay * the value before, in place and in order; h is before the first.

    Where `fresh`, the value before counts as zero, NaN included.
    """
    for t, (decay, value) in enumerate(zip(decays, values, strict=True)):
        h = value.addcmul_(decay, h if fresh is None else h.masked_fill(fresh[t], 0))


def _over_states(states: Tensor, weights: Tensor) -> Tensor:
    """Sum over N: (L, B, N, D), (L, B, N) -> (L, B, D)."""
    return torch.matmul(weights[:, :, None], states)[:, :, 0]


def _over_channels(states: Tensor, weights: Tensor) -> Tensor:
    """Sum over D: (L, B, N, D), (L, B, D) -> (L, B, N)."""
    return torch.matmul(weights[:, :, None], states.mT)[:, :, 0]
