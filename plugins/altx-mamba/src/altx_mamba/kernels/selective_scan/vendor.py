"""The selective scan by the authors' CUDA kernel, in the package mamba-ssm, where it is installed."""

from __future__ import annotations

from functools import cache, reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from altx_kernels import KernelError

MODULE = "mamba_ssm.ops.selective_scan_interface"


@cache
def _probe() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed"
    return None


def absent() -> str | None:
    """Why it runs nothing here, as far as can be told without the import, which only a call on CUDA asks for."""
    return _probe()


absent._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a compiled graph knows it as a constant


@cache
def load() -> tuple[Any, str | None]:
    """The package's `selective_scan_fn`, or why there is none."""
    try:
        module = import_module(MODULE)
        fn, extension = module.selective_scan_fn, module.selective_scan_cuda
    except Exception as error:  # a missing extension, an unknown GPU, an old version: each fails in its own way
        return None, f"importing {MODULE} fails: {type(error).__name__}: {error}"
    if extension is None:
        return None, "mamba-ssm was built without its CUDA extension: build it with MAMBA_KEEP_CUDA_BUILD=TRUE"
    return fn, None


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
    return load()[1]


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
    y, h = load()[0](
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
