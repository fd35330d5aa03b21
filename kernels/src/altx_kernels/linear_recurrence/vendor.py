"""The Triton kernels of flash-linear-attention (Yang & Zhang), where it is installed."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

WEAKEST = -50.0
"""A log decay after which nothing is left in float32. These kernels subtract sums of log decays, which -inf spoils."""


@cache
def probe() -> str | None:
    """Why it cannot run anything here, or None."""
    if find_spec("fla") is None:
        return "the package flash-linear-attention is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        importlib.import_module("fla.ops.simple_gla")
        importlib.import_module("fla.ops.gla")
    except Exception as error:  # it depends on versions of Triton, transformers and more
        return f"importing fla fails: {error}"
    return None


def absent() -> str | None:
    """As `probe`, which a compiled graph knows as a constant."""
    return probe()


# All that torch.compiler.assume_constant_result does, but for the time that it takes to import the compiler.
absent._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, initial_state: Tensor | None = None,
    reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why it cannot run a call, or None."""
    if v.device.type != "cuda":
        return f"v is on {v.device}, and it is for CUDA"
    if not v.numel() or not q.numel():
        return "there are no tokens"
    if any(x is not None and x.dtype == torch.float64 for x in (q, k, v, g, initial_state)):
        return "it does not compute in float64"
    if reset is not None:
        return "it knows no resets"
    return None


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference, but that `reset` is None. A group's q and k are copied for each of its heads."""
    heads = v.shape[2] // q.shape[2]
    if heads > 1:
        q, k = q.repeat_interleave(heads, 2), k.repeat_interleave(heads, 2)
    arguments = {
        "q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "g": None if g is None else g.float().clamp(min=WEAKEST),
        "scale": 1.0, "initial_state": None if initial_state is None else initial_state.float(),
        "output_final_state": True, "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(v.device, torch.int64),
    }  # fmt: skip
    if g is not None and g.dim() == 4:
        o, S = importlib.import_module("fla.ops.gla").chunk_gla(**arguments)
    else:
        o, S = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla(**arguments)
    return o, S
