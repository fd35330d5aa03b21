"""Positive features in PyTorch, on any device: the running maximum by doubling the reach, in log2 T steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_kernels.arguments import precise
from altx_kernels.autocast import no_autocast
from altx_performer.kernels.positive_features.reference import GONE, LOWEST


def positive_features(
    a: Tensor, b: Tensor, half: Tensor, *, M: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.positive_features`."""
    dtype, out = precise(a, b, half, M), a.dtype
    with no_autocast(a.device):
        a, e = a.to(dtype), b.to(dtype) - half.to(dtype)[..., None]
        with torch.no_grad():
            first = e.new_full((e.shape[0], *e.shape[2:]), LOWEST) if M is None else M.to(dtype)
            m = running_max(torch.cat([first[:, None], e.detach()], 1), reset)
            after = m[:, 1:]
            decay = (m[:, :-1] - after).clamp(GONE, 0)
            if reset is not None:
                decay = decay.masked_fill(reset[:, :, None, None], GONE)
        x = a + after
        top = x.detach().amax(-1, keepdim=True) if x.shape[-1] else x
        return torch.exp(x - top).to(out), torch.exp(e - after).to(out), decay, m[:, -1].clone()


def running_max(m: Tensor, reset: Tensor | None) -> Tensor:
    """The largest of m (B, T + 1, H, F) so far, `LOWEST` at the least. A reset (B, T) of m[:, 1:] starts anew."""
    document = None if reset is None else F.pad(reset.cumsum(1), (1, 0))
    shift = 1
    while shift < m.shape[1]:
        later = torch.maximum(m[:, shift:], m[:, :-shift])
        if document is not None:
            same = document[:, shift:] == document[:, :-shift]
            later = torch.where(same[:, :, None, None], later, m[:, shift:])
        m = torch.cat([m[:, :shift], later], 1)
        shift *= 2
    return m.clamp(min=LOWEST)
