"""SSD by the authors' Triton kernels, in the package mamba-ssm."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.op import Backend
from altx_mamba.kernels.mamba_ssm import absent, load, problem

THEIRS = ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
CHUNK = 256
"""Tokens of a chunk, as in the authors' module."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`. Their states are transposed, (B, H, P, N)."""
    # A row's sequences are told apart by number; the state before the call belongs to number 0.
    number = None if reset is None else reset.cumsum(1, dtype=torch.int32)
    if cu_seqlens is not None:
        starts = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        inner = cu_seqlens[1:-1]
        # An empty sequence at the end starts at no token.
        number = starts.index_fill(1, inner[inner < x.shape[1]], 1).cumsum(1, dtype=torch.int32)
    y, *states = load(*THEIRS)[0](
        x, dt, A, B.to(x.dtype), C.to(x.dtype), chunk_size=CHUNK, D=D,
        initial_states=None if initial_state is None else initial_state.mT,
        seq_idx=number, cu_seqlens=cu_seqlens, return_final_states=True, return_varlen_states=cu_seqlens is not None,
    )  # fmt: skip
    h = states[-1].float().mT
    if cu_seqlens is not None:
        h = h.masked_fill((cu_seqlens.diff() == 0)[:, None, None, None], 0)
    return y, h


def unavailable(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> str | None:
    """What their kernels do not do, in words."""
    given = [t for t in (x, dt, A, B, C, D, initial_state) if t is not None]
    if x.device.type != "cuda":
        return f"x is on {x.device}, and mamba-ssm's kernels run on CUDA"
    if any(t.dtype == torch.float64 for t in given):
        return "an argument is float64, in which mamba-ssm does not compute"
    if not x.numel():
        return "there are no tokens"
    if cu_seqlens is not None and initial_state is not None:
        return "mamba-ssm takes no initial states for a packed batch"
    if cu_seqlens is not None and reset is not None:
        return "mamba-ssm takes no resets in a packed batch"
    if cu_seqlens is not None and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "mamba-ssm's states of a packed batch have no gradient"
    return problem(*THEIRS)


MAMBA_SSM: Backend[tuple[Tensor, Tensor]] = Backend("mamba-ssm", ssd, unavailable, absent)
