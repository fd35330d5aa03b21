"""The angles of a rotating state: sums of small turns, modulo a full one, over any number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_mamba.kernels.mamba3.reference import TURN

CHUNK = 64
"""Tokens that are summed without taking whole turns away."""


def accumulate(turns: Tensor, initial: Tensor | None, fresh: Tensor | None) -> Tensor:
    """The angle after each token, from 0 to 2 pi.

    Args:
        turns: (B, T, H, R), what each token turns by.
        initial: (B, T or 1, H, R), the angle that the sum at a token starts from; zero if None.
        fresh: (B, T) bool, where a sum starts; it starts at a row's first token in any case.
    """
    if fresh is None:
        total = _running(turns)
        return torch.remainder(total if initial is None else total + initial, TURN)
    # Sums are differences of running sums, which what is not finite must not enter: it would reach other sequences.
    broken = ~turns.isfinite()
    turns = turns.masked_fill(broken, 0)
    total, faults = _running(turns), broken.cumsum(1, dtype=torch.int32)
    step = torch.arange(turns.shape[1], device=turns.device)
    start = torch.where(fresh, step, 0).cummax(1).values[..., None, None].expand_as(turns)
    angle = total - (total - turns).gather(1, start)
    angle = torch.remainder(angle if initial is None else angle + initial, TURN)
    earlier = (faults - broken.int()).gather(1, start)
    return angle.masked_fill(faults > earlier, torch.nan)


def _running(turns: Tensor) -> Tensor:
    """Sums over the tokens up to each, up to whole turns, as precise for the last token as for the first."""
    length = turns.shape[1]
    if length <= CHUNK:
        return turns.cumsum(1)
    inside = F.pad(turns, (0, 0, 0, 0, 0, -length % CHUNK))
    inside = inside.reshape(len(turns), -1, CHUNK, *turns.shape[2:]).cumsum(2)
    # One number in CHUNK: float64 costs nothing. Apple's GPUs have none.
    wide = torch.float32 if turns.device.type == "mps" else torch.float64
    whole = inside[:, :, -1].to(wide)
    before = torch.remainder(whole.cumsum(1) - whole, TURN).to(turns.dtype)
    total = (inside + before[:, :, None]).flatten(1, 2)
    return total[:, :length]
