"""Rotary position embedding: the op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from altx_attention.kernels.rotary import cases, native, reference
from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.gpu import triton_backend
from altx_kernels.op import Backend, KernelError, Op

_TRITON: Backend[Tensor] = triton_backend("altx_attention.kernels.rotary", "x cos sin", x=4096)


def _unavailable(x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> str | None:
    return _TRITON.unavailable(x, cos, sin, **options) or native.constants(cos, sin)


OP: Op[Tensor] = Op(
    "rotary",
    reference.rotary,
    [
        Backend("triton", _TRITON.fn, _unavailable, _TRITON.absent),
        Backend("native", native.rotary, native.unavailable, native.LIBRARY.problem),
    ],
    summary="rotary position embedding of whole heads or a part of them, by given cosines and sines",
    examples=cases.examples,
    workloads=cases.workloads,
)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, first: int = 0, interleave: bool = False, backend: str | None = None
) -> Tensor:
    """Turn planes of two features of every head.

        (a, b) becomes (a cos - b sin, b cos + a sin)

    Args:
        x: (B, T, H, D).
        cos, sin: (B or 1, T, E) of each plane's angle.
        first: the first of the 2 E features that are turned; the others stay.
        interleave: plane i is features 2 i and 2 i + 1 of these, as in Su et al. 2021; else i and i + E, as in GPT-NeoX
            and Llama.
        backend: pins a backend by name.

    Returns:
        (B, T, H, D) in the dtype of x.

    Raises:
        KernelError: if the arguments do not fit together.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15.
    """
    check_shapes(OP.name, {}, x=(x, "B T H D"), cos=(cos, "A T E"), sin=(sin, "A T E"))
    check_floats(OP.name, x=x, cos=cos, sin=sin)
    if len(cos) not in (1, len(x)):
        raise KernelError(f"op {OP.name!r}: cos has {len(cos)} rows and x {len(x)}", hint="pass one row, or as many")
    if first < 0 or first + 2 * cos.shape[-1] > x.shape[-1]:
        raise KernelError(
            f"op {OP.name!r}: {cos.shape[-1]} planes from feature {first} on do not fit {x.shape[-1]} features",
            hint=f"pass {max(0, x.shape[-1] - max(first, 0)) // 2} angles at most",
        )
    return OP(x, cos, sin, first=first, interleave=interleave, backend=backend)
