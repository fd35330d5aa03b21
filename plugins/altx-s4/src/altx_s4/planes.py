"""Complex numbers as two real planes, (..., 2, N): torch compiles and autocasts real numbers only."""

from __future__ import annotations

import torch
from torch import Tensor


def join(real: Tensor, imaginary: Tensor) -> Tensor:
    """Complex numbers (..., 2, N) from their parts (..., N)."""
    return torch.stack([real, imaginary], -2)


def times(a: Tensor, b: Tensor) -> Tensor:
    """a b."""
    (ar, ai), (br, bi) = a.unbind(-2), b.unbind(-2)
    return join(ar * br - ai * bi, ar * bi + ai * br)


def conjugate(a: Tensor) -> Tensor:
    real, imaginary = a.unbind(-2)
    return join(real, -imaginary)


def inverse(a: Tensor) -> Tensor:
    """1 / a."""
    return conjugate(a) / a.square().sum(-2, keepdim=True)


def expm1(a: Tensor) -> Tensor:
    """e^a - 1, with all its digits where a is small."""
    real, imaginary = a.unbind(-2)
    grown, half = torch.expm1(real), torch.sin(imaginary / 2)
    return join(grown * torch.cos(imaginary) - 2 * half.square(), (grown + 1) * torch.sin(imaginary))
