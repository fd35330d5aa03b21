"""The kernels of flash-attn (Dao 2023, arXiv:2307.08691), where it is installed."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = 256
"""Width of a head that its kernels take."""


@cache
def probe() -> str | None:
    """Why it cannot run anything here, or None. It is imported only where there is a GPU for it."""
    if find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"the GPU has compute capability {torch.cuda.get_device_capability()}, and (8, 0) is needed"
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # it is compiled for one version of torch
        return f"importing flash_attn fails: {error}"
    return None


def absent() -> str | None:
    """As `probe`, which a compiled graph knows as a constant."""
    return probe()


# All that torch.compiler.assume_constant_result does, but for the time that it takes to import the compiler.
absent._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable(
    q: Tensor, k: Tensor, v: Tensor, *, offset: Tensor | None = None, document: Tensor | None = None,
    sinks: Tensor | None = None, **options: Any,
) -> str | None:  # fmt: skip
    """Why it cannot run a call, or None."""
    if q.device.type != "cuda":
        return f"q is on {q.device}, and it is for CUDA"
    if not q.numel() or not k.numel():
        return "there is nothing to attend to"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, and it computes in 16 bits"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads are {max(q.shape[-1], v.shape[-1])} wide, and its kernels take {WIDEST} at most"
    if offset is not None or document is not None:
        return "it knows no documents and no queries at different slots"
    if sinks is not None:
        return "it knows no sinks"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, offset: Tensor | None = None,
    document: Tensor | None = None, slot_document: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference, for queries at the last slots and without documents and sinks."""
    width, wide = q.shape[-1], v.shape[-1]
    scale = width**-0.5 if scale is None else scale
    # It takes keys and values of one width.
    q, k, v = (F.pad(t, (0, max(width, wide) - t.shape[-1])) if width != wide else t for t in (q, k, v))
    reach = -1 if window is None else window - 1
    y: Tensor = importlib.import_module("flash_attn").flash_attn_func(
        q, k, v, softmax_scale=scale, causal=causal, window_size=(reach, 0 if causal else reach),
        softcap=0.0 if softcap is None else softcap,
    )  # fmt: skip
    return y[..., :wide]
