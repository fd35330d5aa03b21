"""The authors' package mamba-ssm: whether it can be used here, and its functions. Imported when a call on CUDA asks."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


@cache
def _probe() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed (pip install altx-mamba[mamba-ssm])"
    return None


@cache
def load(module: str, function: str, extension: str = "") -> tuple[Any, str | None]:
    """A function of the package, or why there is none.

    Args:
        module: where it is, in full.
        function: its name there.
        extension: name there of the CUDA extension that it needs, if any; None where that was not built.
    """
    try:
        loaded = import_module(module)
        fn, built = getattr(loaded, function), not extension or getattr(loaded, extension) is not None
    except Exception as error:  # a missing extension, an unknown GPU, an old version: each fails in its own way
        return None, f"importing {module} fails: {type(error).__name__}: {error}"
    if not built:
        return None, "mamba-ssm was built without its CUDA extension: build it with MAMBA_KEEP_CUDA_BUILD=TRUE"
    return fn, None


def absent() -> str | None:
    """Why it runs nothing here, as far as can be told without the import."""
    return _probe()


def problem(module: str, function: str, extension: str = "") -> str | None:
    """Why a function of the package cannot be used, or None; imports it."""
    return load(module, function, extension)[1]


# All that torch.compiler.assume_constant_result does, but for the time that it takes to import the compiler: a compiled
# graph knows the two as constants.
absent._dynamo_marked_constant = True  # type: ignore[attr-defined]
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
