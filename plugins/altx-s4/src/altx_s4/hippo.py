"""HiPPO-LegS, the matrix that makes a state remember all of its past as Legendre polynomials, diagonalised.

Source: Gu, Dao, Ermon, Rudra & Ré 2020, arXiv:2008.07669, and Gu, Goel & Ré 2022, arXiv:2111.00396, Theorem 1: A =
V (diag(a) - p p^*) V^*, normal plus low-rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altx_s4.planes import join


class HiPPO(NamedTuple):
    """One of each conjugate pair; N states stand for 2 N.

    Args:
        a: (2, N), eigenvalues of the normal part, with negative imaginary parts.
        p: (2, N), the low-rank part.
        b: (2, N), the input.
        V: (2N, N) complex, the eigenvectors.
    """

    a: Tensor
    p: Tensor
    b: Tensor
    V: Tensor


def legs(states: int) -> HiPPO:
    """HiPPO-LegS of `states`, an even number, in float64."""
    n = torch.arange(states, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    p = (n + 0.5).sqrt()
    A = -(torch.outer(root, root).tril() - torch.diag(n))
    # A + p p^T is -1/2 and a skew-symmetric matrix, whose eigenvalues are imaginary.
    skew = A + torch.outer(p, p)
    turn, V = torch.linalg.eigh(-1j * skew)  # ascending: the first half is negative
    V = V[:, : states // 2]
    # An eigenvector is known up to a factor of size 1. As LAPACK has it, but for the sign, its first number is real.
    V = V * (V[0].conj() / V[0].abs())
    a = torch.complex(skew.diagonal().mean().expand(states // 2), turn[: states // 2])
    adjoint = V.conj().T

    def planes(z: Tensor) -> Tensor:
        return join(z.real, z.imag)

    return HiPPO(planes(a), planes(adjoint @ p.to(V.dtype)), planes(adjoint @ root.to(V.dtype)), V)


def clipped(b: Tensor, limit: float = 2.0) -> Tensor:
    """b (2, N) with imaginary parts no larger than the authors' code lets them be."""
    real, imaginary = b.unbind(-2)
    return join(real, imaginary.clamp(-limit, limit))
