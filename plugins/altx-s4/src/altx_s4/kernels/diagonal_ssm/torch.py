"""The diagonal state space in PyTorch, chunk by chunk: what runs anywhere without a compiled kernel.

Within a chunk y is a convolution of x, written as a matrix product of each channel; what came before the chunk is in
its first state. From chunk to chunk the states follow one another. So there is one state for every L tokens, and
nothing else is larger than x.

Every complex number is a pair of reals here, and a channel's system one of S = 2 N real states: h_t = A h_{t-1} +
B x_t, y_t = C h_t. Letters as in `reference`; L tokens in each of K chunks, I planes of x and y.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast

CHUNK = 64
"""Tokens in a chunk: as many as a channel usually has states, so that the states are no larger than x."""

SHORT = 16
"""Tokens in a chunk with resets, between any two of which it is asked whether there is one."""

Act = Callable[[Tensor, Tensor], Tensor]


def diagonal_ssm(
    x: Tensor,
    rate: Tensor,
    c: Tensor,
    b: Tensor | None = None,
    w: Tensor | None = None,
    v: Tensor | None = None,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `diagonal_ssm.diagonal_ssm`."""
    dtype, out = precise(x, rate, c, b, w, v, D, initial_state), x.dtype
    rate, c = rate.to(dtype), c.to(dtype)
    batch, tokens = x.shape[:2]
    planes = x.to(dtype) if x.dim() == 4 else x.to(dtype)[:, :, None]
    h = x.new_zeros(batch, *rate.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if not planes.numel():
        return torch.zeros_like(x), h.clone()
    with no_autocast(x.device):
        chunk = min(CHUNK if reset is None else SHORT, 1 << (tokens - 1).bit_length())
        low_rank = [t.to(dtype) for t in (b, w, v) if t is not None]
        system = _System(rate, c, low_rank, planes.shape[2], chunk)
        y, h = _scan(planes, h.flatten(-2), system, reset, lengths)
        y = y if x.dim() == 4 else y[:, :, 0]
        if D is not None:
            y = torch.addcmul(y, planes[:, :, 0], D.to(dtype))
        if lengths is not None:
            y = torch.where(_reaches(lengths, tokens).reshape(batch, tokens, *[1] * (y.dim() - 2)), y, 0)
    return y.to(out), h.unflatten(-1, (2, -1))


class _System:
    """A real system, and what a chunk of it needs.

    Args:
        rate, c: as in `reference`.
        low_rank: b, w and v, or none.
        planes: I.
        chunk: L, a power of 2.

    Attributes:
        powers: A - 1, A^2 - 1, A^4 - 1, ..., A^L - 1, whatever `act` takes.
        columns: (L, I, H, S), A^j B.
        rows: (L, I, H, S), C A^(j+1).
        kernel: (L, I, I, H), C A^j B, outputs before inputs.
    """

    def __init__(self, rate: Tensor, c: Tensor, low_rank: list[Tensor], planes: int, chunk: int) -> None:
        one, none = torch.ones_like(rate[:, 0]), torch.zeros_like(rate[:, 0])
        B = [torch.stack([one, none], 1), torch.stack([none, one], 1)][:planes]
        C = [torch.stack([c[:, 0], -c[:, 1]], 1), torch.stack([c[:, 1], c[:, 0]], 1)][:planes]
        self.act: Act = _times
        back: Act = _times_conjugate
        square: Callable[[Tensor], Tensor] = _square
        if low_rank:
            b, w, v = low_rank
            B = [b]
            re, im = torch.diag_embed(rate[:, 0]), torch.diag_embed(rate[:, 1])
            rate = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
            rate = rate - w.flatten(1)[:, :, None] * torch.cat([v[:, 0], -v[:, 1]], 1)[:, None]
            self.act, back, square = _matrix, _matrix_transposed, _matrix_square
        self.powers = [rate]
        while 1 << (len(self.powers) - 1) < chunk:
            self.powers.append(square(self.powers[-1]))
        inputs, outputs = (torch.stack(parts).flatten(-2)[None] for parts in (B, C))
        self.columns, self.rows = inputs, back(rate, outputs)
        for power in self.powers[:-1]:
            self.columns = torch.cat([self.columns, self.act(power, self.columns)])
            self.rows = torch.cat([self.rows, back(power, self.rows)])
        self.kernel = torch.einsum("ohs,jihs->joih", outputs[0], self.columns)

    def after(self, h: Tensor, steps: int | Tensor) -> Tensor:
        """A^steps h, for h (B, H, S) and one number or (B,) of them, at most L."""
        for k, power in enumerate(self.powers):
            if isinstance(steps, Tensor):
                h = torch.where(((steps >> k) & 1 == 1)[:, None, None], self.act(power, h), h)
            elif (steps >> k) & 1:
                h = self.act(power, h)
        return h


def _times(rate: Tensor, z: Tensor) -> Tensor:
    """(1 + rate) z for complex rate (H, 2, N), z (..., H, S)."""
    (re, im), (zr, zi) = rate.unbind(-2), z.unflatten(-1, (2, -1)).unbind(-2)
    return z + torch.cat([re * zr - im * zi, re * zi + im * zr], -1)


def _times_conjugate(rate: Tensor, z: Tensor) -> Tensor:
    (re, im), (zr, zi) = rate.unbind(-2), z.unflatten(-1, (2, -1)).unbind(-2)
    return z + torch.cat([re * zr + im * zi, re * zi - im * zr], -1)


def _square(rate: Tensor) -> Tensor:
    """(1 + rate)^2 - 1."""
    re, im = rate.unbind(-2)
    return 2 * rate + torch.stack([re * re - im * im, 2 * re * im], -2)


def _matrix(rate: Tensor, z: Tensor) -> Tensor:
    """(1 + rate) z for real rate (H, S, S), z (..., H, S)."""
    return z + torch.einsum("hrs,...hs->...hr", rate, z)


def _matrix_transposed(rate: Tensor, z: Tensor) -> Tensor:
    return z + torch.einsum("hrs,...hr->...hs", rate, z)


def _matrix_square(rate: Tensor) -> Tensor:
    return 2 * rate + rate @ rate


def _reaches(lengths: Tensor, tokens: int) -> Tensor:
    """(B, T) bool, where a row's tokens count."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def _scan(x: Tensor, h: Tensor, system: _System, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, T, I, H) and the last state (B, H, S), from x (B, T, I, H) and the state before it."""
    batch, tokens, planes, channels = x.shape
    chunk = len(system.columns)
    if lengths is not None:
        x = x.masked_fill(~_reaches(lengths, tokens)[..., None, None], 0)
    extra = -tokens % chunk
    x = torch.cat([x, x.new_zeros(batch, extra, planes, channels)], 1).unflatten(1, (-1, chunk))
    ends = torch.full((batch,), tokens, device=x.device) if lengths is None else lengths.clamp(0, tokens)
    real = (ends[:, None] - chunk * torch.arange(x.shape[1], device=x.device)).clamp(0, chunk)  # (B, K)
    which = cut = None
    given = x
    if reset is not None:
        reset = torch.cat([reset, reset.new_zeros(batch, extra)], 1).unflatten(1, (-1, chunk))
        # Which sequence of its chunk a token belongs to, and whether it is that of the last one.
        which = (reset & (torch.arange(chunk, device=x.device) < real[..., None])).cumsum(-1)
        cut = which[..., -1] > 0
        given = x.masked_fill((which < which[..., -1:])[..., None, None], 0)
    if lengths is not None or extra:
        # The last real token of a chunk where its last is.
        at = torch.arange(chunk, device=x.device) - (chunk - real[..., None])
        moved = given.gather(2, at.clamp(min=0)[..., None, None].expand_as(given))
        given = moved.masked_fill((at < 0)[..., None, None], 0)
    added = torch.einsum("bklih,lihs->bkhs", given, system.columns.flip(0))
    starts = []
    for k in range(x.shape[1]):
        starts.append(h)
        last = tokens - k * chunk
        kept = system.after(h, real[:, k] if lengths is not None else min(last, chunk))
        h = added[:, k] + (kept if cut is None else torch.where(cut[:, k, None, None], 0, kept))
    past = torch.einsum("bkhs,lohs->bkloh", torch.stack(starts, 1), system.rows)
    if which is None:
        y = past + torch.einsum("ljoih,bkjih->bkloh", _toeplitz(system.kernel), x)
    else:
        y = torch.where((which == 0)[..., None, None], past, 0)
        for lag in range(chunk):
            same = which[..., lag:] == which[..., : chunk - lag]
            seen = torch.where(same[..., None, None], x[:, :, : chunk - lag], 0)
            y = torch.cat(
                [y[:, :, :lag], y[:, :, lag:] + torch.einsum("oih,bklih->bkloh", system.kernel[lag], seen)], 2
            )
    return y.flatten(1, 2)[:, :tokens], h


def _toeplitz(kernel: Tensor) -> Tensor:
    """(L, L, I, I, H): what token j adds to token l, from the kernel (L, I, I, H)."""
    step = torch.arange(len(kernel), device=kernel.device)
    lag = step[:, None] - step
    return kernel[lag.clamp(min=0)].masked_fill((lag < 0)[..., None, None, None], 0)
