"""The Triton kernels of flash-linear-attention (Yang & Zhang), where it is installed.

Its `chunk_dplr_delta_rule` writes the same recurrence with the names exchanged: b (a^T S) for a (b^T S), in 0.6.0.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

MODULE = "fla.ops.generalized_delta_rule"


@cache
def probe() -> str | None:
    """Why it cannot run anything here, or None."""
    if find_spec("fla") is None:
        return "the package flash-linear-attention is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        importlib.import_module(MODULE)
    except Exception as error:  # it depends on versions of Triton, transformers and more
        return f"importing fla fails: {error}"
    return None


def absent() -> str | None:
    """As `probe`, which a compiled graph knows as a constant."""
    return probe()


# All that torch.compiler.assume_constant_result does, but for the time that it takes to import the compiler.
absent._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None = None,
    *, initial_state: Tensor | None = None, reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why it cannot run a call, or None."""
    if v.device.type != "cuda":
        return f"v is on {v.device}, and it is for CUDA"
    if not v.numel() or not q.numel():
        return "there are no tokens"
    if any(x.dtype not in (torch.bfloat16, torch.float16) for x in (q, k, v, a, b)):
        return "it computes in bfloat16 and float16"
    if initial_state is not None and initial_state.dtype == torch.float64:
        return "it does not compute in float64"
    if q.shape[3] > 256:
        return f"q has {q.shape[3]} channels, and it is for up to 256"
    if reset is not None:
        return "it knows no resets"
    if g is not None:
        # It forms exp(-g) over up to 15 tokens and multiplies by 0 what lies above the diagonal: inf * 0.
        return "its decays become NaN where they sum to less than -88 within a chunk, which shapes do not tell"
    return None


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None = None,
    *, initial_state: Tensor | None = None, reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference, for g and reset None."""
    o, state = importlib.import_module(MODULE).chunk_dplr_delta_rule(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        a=b.to(v.dtype),
        b=a.to(v.dtype),
        gk=torch.zeros_like(q, dtype=torch.float32),
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(v.device, torch.int64),
    )
    return o, state
