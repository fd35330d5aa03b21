"""A diagonal state space as the papers write it: one token at a time, in any dtype. The oracle of every backend.

Papers: Gu, Gupta, Goel & Ré 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
arXiv:2206.11893, equation 2; with `w` and `v`, Gu, Goel & Ré 2022, arXiv:2111.00396, appendix C.2.

    code        what it is                                      shape
    x           the input; complex where it has two planes      (B, T, H) or (B, T, 2, H)
    rate        A-bar - 1, complex                              (H, 2, N)
    c           C-bar, complex                                  (H, 2, N)
    b           B-bar, complex; else 1                          (H, 2, N)
    w, v        A-bar has a second part, -w Re(v^T)             (H, 2, N)
    D           the skip                                        (H,)
    h           the state, complex                              (B, H, 2, N)

B rows, T tokens, H channels, N complex states. A complex number is two planes, its real and its imaginary part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altx_kernels.arguments import precise


def diagonal_ssm(
    x: Tensor,
    rate: Tensor,
    c: Tensor,
    b: Tensor | None = None,
    w: Tensor | None = None,
    v: Tensor | None = None,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `diagonal_ssm.diagonal_ssm`."""
    dtype, out = precise(x, rate, c, b, w, v, D, initial_state), x.dtype

    def joined(planes: Tensor) -> Tensor:
        return torch.complex(*planes.to(dtype).unbind(-2))

    a, c = 1 + joined(rate), joined(c)
    x = x.to(dtype)
    inputs = joined(x) if x.dim() == 4 else x
    rows, tokens = inputs.shape[:2]
    h = a.new_zeros(rows, *a.shape) if initial_state is None else joined(initial_state)
    ys = []
    for t in range(tokens):
        before = h if reset is None else torch.where(reset[:, t, None, None], 0, h)
        u = inputs[:, t, :, None]
        if b is None or w is None or v is None:
            new = a * before + u
        else:
            new = a * before + joined(b) * u - joined(w) * (joined(v) * before).real.sum(-1, keepdim=True)
        y = (c * new).sum(-1)
        if x.dim() == 3:
            y = y.real if D is None else y.real + D.to(dtype) * inputs[:, t]
        if lengths is not None:
            real = (t < lengths)[:, None]
            new, y = torch.where(real[..., None], new, h), torch.where(real, y, 0)
        h = new
        ys.append(y)
    if not ys:
        y = torch.zeros_like(x)
    elif x.dim() == 4:
        y = torch.stack([torch.stack([y.real, y.imag], -2) for y in ys], 1)
    else:
        y = torch.stack(ys, 1)
    return y.to(out), torch.stack([h.real, h.imag], -2)
