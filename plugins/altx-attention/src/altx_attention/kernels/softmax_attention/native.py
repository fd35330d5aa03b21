"""Attention of one query per row in C, for CPUs: a step of decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.native import Library
from altx_kernels.primitive import Primitive

LIBRARY = Library(Path(__file__).with_name("native.c"), {"decode": "ppiiipiiippppppiiiiiiiiiddi"})

SHARED = 4
"""Heads of a key-value head beyond which a matrix product is faster."""

SPLIT = 256
"""Slots that a thread walks through at the least."""

BLOCK = 32
"""As in native.c."""


def unavailable(q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, **options: Any) -> str | None:
    """Why it cannot run a call, or None."""
    if q.device.type != "cpu":
        return f"q is on {q.device}, and native code runs on the CPU"
    if q.shape[1] != 1:
        return f"there are {q.shape[1]} queries in a row, and it is for one"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float64):
        return "it reads float32 and float64, all of one kind"
    if q.shape[2] > SHARED * k.shape[2]:
        return f"{q.shape[2] // k.shape[2]} heads share a key, and beyond {SHARED} a matrix product is faster"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        return "it has no gradient"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, offset: Tensor | None = None,
    document: Tensor | None = None, slot_document: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference, for one query per row."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y: Tensor = NODE(q, k, v, offset, document, slot_document, sinks, causal, window or 0, scale, softcap or 0.0)
    return y


def _decode(
    q: Tensor, k: Tensor, v: Tensor, offset: Tensor | None, document: Tensor | None, slot_document: Tensor | None,
    sinks: Tensor | None, causal: bool, window: int, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    (B, S, G, D), H, E = k.shape, q.shape[2], v.shape[-1]
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    threads = torch.get_num_threads() if k.numel() > SPLIT * 64 else 1
    splits = max(1, min(-(-threads // max(B, 1)), S // SPLIT))
    y = torch.empty(B, 1, H, E, dtype=q.dtype)
    parts = torch.empty(B * splits * H * (E + 2 + BLOCK), dtype=q.dtype)
    places = (None if t is None else t.to(torch.int64).contiguous() for t in (offset, document, slot_document))
    LIBRARY.call(
        "decode", q.dtype, q.contiguous(), k, *k.stride()[:3], v, *v.stride()[:3], *places,
        None if sinks is None else sinks.to(q.dtype).expand(B, 1, H).contiguous(), y, parts, B, S, H, G, D, E,
        int(causal), window, splits, scale, softcap, threads,
    )  # fmt: skip
    return y


def _fake(
    q: Tensor, k: Tensor, v: Tensor, offset: Tensor | None, document: Tensor | None, slot_document: Tensor | None,
    sinks: Tensor | None, causal: bool, window: int, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[-1])


NODE = Primitive("altx_attention::decode", _decode, _fake)
