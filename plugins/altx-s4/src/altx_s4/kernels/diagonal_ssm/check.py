"""What a call of the op must look like."""

from __future__ import annotations

from torch import Tensor
from torch import bool as boolean

from altx_kernels import KernelError
from altx_kernels.arguments import check_floats, check_shapes


def check(
    op: str, x: Tensor, rate: Tensor, c: Tensor, b: Tensor | None, w: Tensor | None, v: Tensor | None,
    D: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, lengths: Tensor | None,
) -> None:  # fmt: skip
    """Raises KernelError if the arguments do not fit together."""
    letters = "B T 2 H" if x.dim() == 4 else "B T H"
    check_shapes(
        op, {"2": 2}, x=(x, letters), rate=(rate, "H 2 N"), c=(c, "H 2 N"), b=(b, "H 2 N"), w=(w, "H 2 N"),
        v=(v, "H 2 N"), D=(D, "H"), initial_state=(initial_state, "B H 2 N"), reset=(reset, "B T"),
        lengths=(lengths, "B"),
    )  # fmt: skip
    check_floats(op, x=x, rate=rate, c=c, b=b, w=w, v=v, D=D, initial_state=initial_state)
    given = [name for name, value in (("b", b), ("w", w), ("v", v)) if value is not None]
    if given and len(given) < 3:
        raise KernelError(f"op {op!r}: {' and '.join(given)} without the others", hint="pass b, w and v, or none")
    if x.dim() == 4 and (given or D is not None):
        raise KernelError(f"op {op!r}: {given[0] if given else 'D'} is given with a complex x", hint="pass a real x")
    if reset is not None and reset.dtype != boolean:
        raise KernelError(f"op {op!r}: reset has dtype {reset.dtype}", hint="pass bool")
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == boolean):
        raise KernelError(f"op {op!r}: lengths has dtype {lengths.dtype}", hint="pass int64")
