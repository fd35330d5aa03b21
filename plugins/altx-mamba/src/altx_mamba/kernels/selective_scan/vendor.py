"""The selective scan by the authors' CUDA kernel, in the package mamba-ssm, where it is installed."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from altx_kernels import KernelError
from altx_mamba.kernels.mamba_ssm import absent, load, problem

THEIRS = ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "selective_scan_cuda")

__all__ = ["absent", "selective_scan", "unavailable"]


def unavailable(
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
) -> str | None:
    """What the package does not do, in words."""
    if x.device.type != "cuda":
        return f"x is on {x.device}, and mamba-ssm's kernels run on CUDA"
    for name, given in (("initial state", initial_state), ("reset", reset), ("packed batch", cu_seqlens)):
        if given is not None:
            return f"mamba-ssm's scan takes no {name}"
    tensors = [t for t in (x, dt, A, B, C, D, z, dt_bias) if t is not None]
    if any(t.dtype == torch.float64 for t in tensors):
        return "an argument is float64, in which mamba-ssm does not compute"
    if not x.numel() or not A.numel():
        return "there are no tokens or no states"
    if A.shape[1] > 256:
        return f"there are {A.shape[1]} states per channel, and mamba-ssm's scan takes up to 256"
    if torch.compiler.is_compiling():
        return "torch.compile cannot see into mamba-ssm's scan"
    return problem(*THEIRS)


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
    """As `selective_scan.selective_scan`. The package has time last, one dtype per token and float32 weights."""
    dtype = reduce(torch.promote_types, [t.dtype for t in (x, dt, B, C, z) if t is not None])
    u, delta, B, C = (t.to(dtype).mT for t in (x, dt, B, C))
    y, h = load(*THEIRS)[0](
        u, delta, A.float(), B, C,
        D=None if D is None else D.float(),
        z=None if z is None else z.to(dtype).mT,
        delta_bias=None if dt_bias is None else dt_bias.float(),
        delta_softplus=softplus,
        return_last_state=True,
    )  # fmt: skip
    return y.mT.to(x.dtype), _Refusing.apply(h.float(), y)  # type: ignore[no-untyped-call]


class _Refusing(torch.autograd.Function):
    """The last state, whose gradient the package would lose without a word. Training seldom asks for it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor) -> Tensor:
        """h, on the graph of y."""
        return h.clone()

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[None, None]:
        raise KernelError(
            "backend 'mamba-ssm' of op 'selective-scan' has no gradient of the last state",
            hint="leave the state out of the loss, detach it, or pin another backend",
        )
