"""Backends in Triton: where they run, without importing Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from altx_kernels.op import Backend, available
from altx_kernels.trees import leaves

# Triton decides when it is imported, and so does this.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDED = (8, 0)


def absent() -> str | None:
    """Why this machine cannot run Triton kernels, or None."""
    if not _installed():
        return "triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < NEEDED:
        return f"the GPU has compute capability {torch.cuda.get_device_capability()}, and {NEEDED} is needed"
    return None


# A compiled graph knows it as a constant; see altx_kernels.native.library.
absent._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _installed() -> bool:
    # Looking through the import path takes as long as a small op.
    return find_spec("triton") is not None


def triton_backend(
    package: str, names: str, fits: Callable[..., str | None] = available, **widest: int
) -> Backend[Any]:
    """The backend "triton" of an op; its module is imported at the first call.

    Args:
        package: the op's package, whose module `triton` has a function `run`.
        names: the op's positional parameters, separated by blanks; tensors, or named tuples of them.
        fits: given a call's arguments, why they do not fit a program in another way, or None.
        widest: by name of a parameter, the largest last dimension that fits a program's registers.
    """
    parameters = names.split()

    def unavailable(*args: Any, **kwargs: Any) -> str | None:
        # A caller may give fewer positional arguments than there are.
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        for parameter, argument in arguments.items():
            several = isinstance(argument, tuple)
            for name, value in leaves(argument, parameter).items() if several else ((parameter, argument),):
                if not isinstance(value, Tensor):
                    continue
                if parameter in parameters and not (value.is_cuda or (INTERPRETED and value.device.type == "cpu")):
                    return f"{name} is on {value.device}, and Triton kernels run on CUDA"
                if value.dtype == torch.float64:
                    return f"{name} is float64, and Triton kernels compute in float32"
                if value.shape[-1:] > (widest.get(name, value.shape[-1] if value.dim() else 0),):
                    return f"the last dimension of {name} is {value.shape[-1]}, larger than {widest[name]}"
        return fits(*args, **kwargs)

    return Backend("triton", _Lazy(f"{package}.triton"), unavailable, absent)


class _Lazy:
    """The function `run` of a module that is imported when it is first called."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.run: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.run is None:
            self.run = import_module(self.module).run
        return self.run(*args, **kwargs)
