"""altx-s4 beside what its papers' authors compute a whole sequence with, as torch functions of our weights: for S4D and
S4 a convolution by FFT with the kernel that their code makes (Vandermonde; Cauchy with Woodbury's identity), for S5 a
parallel scan. Their own code is in no package that can be installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peers import Case, layer


def cases(dim: int, length: int) -> list[Case]:
    try:
        import altx_s4  # noqa: F401
    except ImportError:
        return []
    s4d, s4, s5 = (layer(name, dim) for name in ("s4d", "s4", "s5"))
    C, states = truncated(s4, length), s5.B.shape[0]
    # B and C of S5 are matrices too, if no nn.Linear.
    matrices = nn.ModuleList([s5, nn.Linear(dim, 2 * states), nn.Linear(2 * states, dim)])
    return [
        Case("s4d", lambda x: s4d(x).y, s4d, {"fft convolution": by_fft(s4d, s4d.D, lambda n: vandermonde(s4d, n))}),
        Case("s4", lambda x: s4(x).y, s4, {"fft convolution": by_fft(s4, s4.layer.D[0], lambda n: cauchy(s4, C, n))}),
        Case("s5", lambda x: s5(x).y, matrices, {"parallel scan": lambda x: by_scan(s5, x)}),
    ]


def by_fft(module: Any, D: Tensor, kernel: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        u, length = x.mT, x.shape[1]
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel(length), n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + D[:, None] * u
        out: Tensor = module.output_linear(F.gelu(y.mT))
        return out

    return run


def vandermonde(module: Any, length: int) -> Tensor:
    """(D, L): 2 Re sum_n C_n (e^{dt A_n} - 1) / A_n e^{dt A_n l}."""
    kernel = module.kernel
    A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)
    dtA = A * kernel.log_dt.exp()[:, None]
    C = torch.view_as_complex(kernel.C) * (torch.exp(dtA) - 1) / A
    powers = torch.exp(dtA[..., None] * torch.arange(length))
    return 2 * torch.einsum("hn,hnl->hl", C, powers).real


def truncated(module: Any, length: int) -> Tensor:
    """C (1 - A-bar^L), (D, N) complex: what the authors keep and train in place of C."""
    from altx_s4.checkpoint import dense

    kernel = module.layer.kernel
    with torch.no_grad():
        rate, _, w, v = (z.double() for z in kernel.system())
        sign = torch.tensor([1.0, -1.0])
        C = (kernel.C[0] * sign).mT.flatten(1).double()
        C = C - torch.einsum("hrs,hr->hs", torch.linalg.matrix_power(dense(rate, w, v), length), C)
        return torch.view_as_complex((C.unflatten(1, (2, -1)).mT.float() * sign).contiguous()).requires_grad_()


def cauchy(module: Any, C: Tensor, length: int) -> Tensor:
    """(D, L): the truncated generating function at the roots of unity, and back."""
    kernel = module.layer.kernel
    dt = kernel.inv_dt.exp()
    A = torch.complex(-kernel.A_real.exp(), -kernel.A_imag) * dt
    B, P = (torch.view_as_complex(z)[0] for z in (kernel.B, kernel.P))
    omega = torch.exp(-2j * torch.pi * torch.arange(length // 2 + 1) / length)
    z = 2 * (1 - omega) / (1 + omega)
    pairs = torch.stack([B * C, B * P.conj(), P * C, P * P.conj()]) * dt
    inverse, mirrored = 1 / (z - A[..., None]), 1 / (z - A.conj()[..., None])
    r = torch.einsum("khn,hnl->khl", pairs, inverse) + torch.einsum("khn,hnl->khl", pairs.conj(), mirrored)
    found = (r[0] - r[1] * r[2] / (1 + r[3])) * 2 / (1 + omega)
    return torch.fft.irfft(found, n=length)


def by_scan(module: Any, x: Tensor) -> Tensor:
    Lambda = torch.complex(module.Lambda_re, module.Lambda_im)
    decay = torch.exp(Lambda * module.log_step[:, 0].exp())
    B = ((decay - 1) / Lambda)[:, None] * torch.view_as_complex(module.B)
    _, h = scan(decay.expand(x.shape[1], -1), x.to(B.dtype) @ B.T)
    y = 2 * (h @ torch.view_as_complex(module.C).T).real + module.D * x
    out: Tensor = module.output(y)
    return out


def scan(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Products of a (T, P) and states of h_t = a_t h_{t-1} + u_t (B, T, P), by pairs, pairs of pairs and so on."""
    length = u.shape[1]
    if length == 1:
        return a, u
    even, odd = slice(0, length - length % 2, 2), slice(1, length, 2)
    products, pairs = scan(a[odd] * a[even], a[odd] * u[:, even] + u[:, odd])
    first = a[2::2] * products[: len(a[2::2])]
    second = a[2::2] * pairs[:, : len(a[2::2])] + u[:, 2::2]
    whole, h = torch.empty_like(a), torch.empty_like(u)
    whole[1::2], h[:, 1::2] = products, pairs
    whole[0], h[:, 0] = a[0], u[:, 0]
    whole[2::2], h[:, 2::2] = first, second
    return whole, h
