"""Checkpoints of the authors' S4, whose C is not C.

Their kernel of length L is computed from C (1 - A-bar^L), which is what they train and keep, with L beside it as
`l_kernel`. Here C itself is kept, and serves every length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from altx_s4.s4 import DPLRKernel


def untruncate(module: DPLRKernel, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """A hook before `load_state_dict`: takes `l_kernel` out and C back, in float64."""
    length = state.pop(prefix + "l_kernel", None)
    if length is None or not int(length):
        return
    with torch.no_grad():
        # What their C was multiplied with depends on their other parameters.
        theirs = type(module).__new__(type(module))
        torch.nn.Module.__init__(theirs)
        for name in ("A_real", "A_imag", "B", "P", "inv_dt"):
            setattr(theirs, name, torch.nn.Parameter(state[prefix + name].double()))
        rate, _, w, v = theirs.system()
        A = torch.linalg.matrix_power(dense(rate, w, v), int(length))
        C = state[prefix + "C"]
        # Re(C h) is a product of real vectors, (re C, -im C) and (re h, im h).
        sign = A.new_tensor([1.0, -1.0])
        rows = (C.double() * sign).mT.flatten(-2)
        rows = torch.linalg.solve(torch.eye(A.shape[-1]).to(A) - A.mT, rows[..., None])[..., 0]
        state[prefix + "C"] = (rows.unflatten(-1, (2, -1)).mT * sign).to(C.dtype).contiguous()


def dense(rate: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The transition as real matrices (D, 2N, 2N), which multiply (re h, im h)."""
    re, im = (torch.diag_embed(part) for part in rate.unbind(-2))
    diagonal = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
    v = torch.cat([v[..., 0, :], -v[..., 1, :]], -1)
    return torch.eye(v.shape[-1]).to(rate) + diagonal - w.flatten(-2)[..., None] * v[..., None, :]
