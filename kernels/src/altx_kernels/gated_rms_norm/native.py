"""The gated RMS norm in C, for CPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.arguments import precise
from altx_kernels.gated_rms_norm.primitives import primitives
from altx_kernels.native import Library

LIBRARY = Library(Path(__file__).with_name("native.c"), {"norm": "pipippiiiidi", "norm_backward": "pipipipppppiiiidi"})

BLOCK = 32
"""As in native.c."""

SERIAL = 1 << 16
"""Numbers in y below which a second thread costs more than it saves."""


def unavailable(y: Tensor, *_: Any, **__: Any) -> str | None:
    """Why it cannot run a call, or None."""
    return None if y.device.type == "cpu" else f"y is on {y.device}, and native code runs on the CPU"


def gated_rms_norm(
    y: Tensor, z: Tensor | None, weight: Tensor, *, eps: float, group_size: int, gate_first: bool
) -> Tensor:
    """As the reference."""
    out: Tensor = FORWARD(y, z, weight, eps, group_size, gate_first)
    return out


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (rows, E) in `dtype`, copied only if its rows do not lie evenly, or their channels not side by side."""
    x = x if x.dtype == dtype else x.to(dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _threads(y: Tensor) -> int:
    return torch.get_num_threads() if y.numel() >= SERIAL else 1


def _forward(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, gate_first: bool) -> Tensor:
    dtype = precise(y, z, weight)
    rows, gate = _rows(y, dtype), None if z is None else _rows(z, dtype)
    out = torch.empty(y.shape, dtype=dtype)
    LIBRARY.call(
        "norm", dtype, rows, rows.stride(0), gate, 0 if gate is None else gate.stride(0),
        weight.to(dtype).contiguous(), out, *rows.shape, group_size, int(gate_first), eps, _threads(y),
    )  # fmt: skip
    return out if out.dtype == y.dtype else out.to(y.dtype)


def _backward(
    g: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, gate_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z (empty if there is none) and weight."""
    dtype = precise(y, z, weight)
    dout, rows, gate = _rows(g, dtype), _rows(y, dtype), None if z is None else _rows(z, dtype)
    dy, dz = torch.empty(y.shape, dtype=dtype), torch.empty(0 if z is None else z.shape, dtype=dtype)
    dweight = torch.empty(weight.shape, dtype=dtype)
    LIBRARY.call(
        "norm_backward", dtype, dout, dout.stride(0), rows, rows.stride(0), gate, 0 if gate is None else gate.stride(0),
        weight.to(dtype).contiguous(), dy, dz, torch.empty(-(-len(rows) // BLOCK), rows.shape[1], dtype=dtype), dweight,
        *rows.shape, group_size, int(gate_first), eps, _threads(y),
    )  # fmt: skip
    return dy.to(y.dtype), dz.to(y.dtype if z is None else z.dtype), dweight.to(weight.dtype)


FORWARD, BACKWARD = primitives("gated_rms_norm", _forward, _backward, "CPU")
