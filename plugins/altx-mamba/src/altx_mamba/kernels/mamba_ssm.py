"""Whether the authors' package mamba-ssm can be used here."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch


@cache
def probe(module: str, function: str) -> str | None:
    """Why a function of mamba-ssm cannot be used on this machine, or None. Imports it only where there is a GPU."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed (pip install altx-mamba[mamba-ssm])"
    try:
        getattr(import_module(module), function)
    except Exception as error:  # a missing extension, an unknown GPU, an old version: each fails in its own way
        return f"importing {module} fails: {type(error).__name__}: {error}"
    return None
