"""What the short causal convolution may be called with."""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.op import KernelError
from altx_kernels.packing import check_cu_seqlens


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raises KernelError if shapes, dtypes or devices do not fit together."""
    check_shapes(
        op, {"N": check_cu_seqlens(x, cu_seqlens)}, x=(x, "B T D"), weight=(weight, "D K"), bias=(bias, "D"),
        initial_state=(initial_state, "N K-1 D"), reset=(reset, "B T"), lengths=(lengths, "B"),
    )  # fmt: skip
    check_floats(op, x=x, weight=weight, bias=bias, initial_state=initial_state)
    if not weight.shape[1]:
        raise KernelError(f"op {op!r}: weight has no taps", hint="pass weight (D, K) with K of at least 1")
    if reset is not None and reset.dtype != torch.bool:
        raise KernelError(f"op {op!r}: reset has dtype {reset.dtype}", hint="pass a bool tensor")
    if lengths is not None:
        _check_lengths(op, lengths, x.shape[1], cu_seqlens)


def _check_lengths(op: str, lengths: Tensor, tokens: int, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise KernelError(f"op {op!r}: lengths and cu_seqlens exclude each other", hint="a packed batch has no padding")
    if lengths.dtype != torch.int64:
        raise KernelError(f"op {op!r}: lengths has dtype {lengths.dtype}", hint="pass int64")
    # Values are only looked at where that costs no synchronisation and breaks no graph.
    if lengths.device.type == "cpu" and len(lengths) and not torch.compiler.is_compiling():
        least, most = (int(value) for value in lengths.aminmax())
        if least < 0 or most > tokens:
            raise KernelError(
                f"op {op!r}: lengths go from {least} to {most}", hint=f"they count the row's tokens, 0 to {tokens}"
            )
