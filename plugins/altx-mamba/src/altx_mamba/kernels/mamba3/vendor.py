"""Mamba-3 by the authors' Triton kernels, in the package mamba-ssm. They compute in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.op import Backend
from altx_mamba.kernels.mamba3.reference import Result
from altx_mamba.kernels.mamba_ssm import absent, load, problem

THEIRS = ("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined", "mamba3_siso_combined")


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    initial_angle: Tensor | None = None,
    initial_k: Tensor | None = None,
    initial_v: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `reference.mamba3`. Their states are transposed, (B, H, P, N), and come all or none."""
    rows, heads = len(x) if cu_seqlens is None else len(cu_seqlens) - 1, x.shape[2]
    states = None
    given = (initial_angle, initial_state, initial_k, initial_v)
    if any(state is not None for state in given):
        sizes = angles.shape[2:], (B.shape[3], x.shape[3]), B.shape[3:], x.shape[3:]
        angle, h, k, v = (
            x.new_zeros(rows, heads, *size, dtype=torch.float32) if state is None else state
            for state, size in zip(given, sizes, strict=True)
        )
        states = (angle, h.mT.contiguous(), k.to(x.dtype), v.to(x.dtype))
    y, angle, h, k, v = load(*THEIRS)[0](
        Q=C, K=B, V=x, ADT=(dt.float() * A.float()).mT.contiguous(), DT=dt.float().mT.contiguous(),
        Trap=trap.mT.contiguous(), Q_bias=C_bias, K_bias=B_bias,
        Angles=angles.float()[:, :, None].expand(-1, -1, heads, -1), D=D, Input_States=states,
        return_final_states=True, cu_seqlens=None if cu_seqlens is None else cu_seqlens.int(),
    )  # fmt: skip
    return y, h.float().mT, angle.float(), k.float(), v.float()


def unavailable(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **states: Tensor | None,
) -> str | None:
    """What their kernels do not do, in words."""
    if x.device.type != "cuda":
        return f"x is on {x.device}, and mamba-ssm's kernels run on CUDA"
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, and mamba-ssm computes in bfloat16"
    if not x.numel():
        return "there are no tokens"
    if reset is not None or lengths is not None:
        return "mamba-ssm's Mamba-3 knows neither resets nor padding"
    if cu_seqlens is not None:
        return "mamba-ssm does not say what it does with empty sequences of a packed batch"
    if any(size & (size - 1) for size in (B.shape[3], x.shape[3])):
        return f"state size {B.shape[3]} and head width {x.shape[3]} are not both powers of two"
    return problem(*THEIRS)


MAMBA_SSM: Backend[Result] = Backend("mamba-ssm", mamba3, unavailable, absent)
