"""FAVOR+: attention through positive random features, with exponents that can neither overflow nor vanish.

The paper's features are f_i(x) = exp(w_i x - |x|^2 / 2) / sqrt(F), and attention is

    y_t = sum_j f(q_t).f(k_j) v_j / sum_j f(q_t).f(k_j)                                         (equations 4 and 5)

Whatever is common to all features of a query cancels: its |q|^2 / 2, and 1 / sqrt(F). For the keys, write b_ji for
w_i k_j - |k_j|^2 / 2 and M_ti for the largest b_ji that token t sees. Then

    sum_j f_i(k_j) v_j = exp(M_ti) sum_j exp(b_ji - M_ti) v_j

and exp(M_ti) goes to the query: exp(w_i q_t + M_ti - c_t), where c_t is the largest such exponent of the token and
cancels as well. All exponents are <= 0, and the denominator is >= 1, for the feature with exponent c_t has seen the key
with exponent M_ti. In a causal sequence M grows with t, so the sums decay by exp(M_{t-1} - M_t): a linear recurrence
with a decay per key channel, in which M is part of the state. No later token is looked at, unlike the maximum over the
whole sequence that the authors' code subtracts. M and c change no value, so they get no gradient.

B rows, T tokens, H heads, F features, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from altx_performer.kernels.positive_features import LOWEST, positive_features


def products(x_BTHD: Tensor, features: Tensor) -> Tensor:
    """W x / D^(1/4), (B, T, H, F), for W (F, D), or (B, F, D) where rows have features of their own."""
    scale: float = x_BTHD.shape[-1] ** -0.25
    scaled = features.mT.to(x_BTHD.dtype) * scale
    product: Tensor = x_BTHD.flatten(1, 2) @ scaled
    return product.view(*x_BTHD.shape[:3], -1)


def half_squares(k_BTHD: Tensor, mask: Tensor | None) -> Tensor:
    """|k|^2 / 2 / sqrt(D), (B, T, H); infinite at masked tokens, whose keys then count for nothing."""
    half: Tensor = k_BTHD.square().sum(-1) * (0.5 * k_BTHD.shape[-1] ** -0.5)
    return half if mask is None else half.masked_fill(~mask[:, :, None], torch.inf)


def causal_features(
    q_BTHD: Tensor, k_BTHD: Tensor, features: Tensor, M: Tensor | None, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a linear recurrence makes causal attention of.

    Args:
        features: (F, D), or (B, F, D).
        M: (B, H, F) before the first token, or None.
        mask, reset: (B, T) bool or None.

    Returns:
        Features of queries and keys and the logarithm of the decay, (B, T, H, F), and M after the last token.
    """
    a, b = products(q_BTHD, features), products(k_BTHD, features)
    return positive_features(a, b, half_squares(k_BTHD, mask), M=M, reset=reset)


def whole_features(q_BTHD: Tensor, k_BTHD: Tensor, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features of queries and keys (B, T, H, F) where every token sees every other."""
    a, b, half = products(q_BTHD, features), products(k_BTHD, features), half_squares(k_BTHD, mask)
    with torch.no_grad():
        M = (b - half[..., None]).amax(1).clamp(min=LOWEST)
    # With the largest exponents known beforehand, nothing decays.
    qf, kf, _, _ = positive_features(a, b, half, M=M)
    return qf, kf


def relu_features(x_BTHD: Tensor, features: Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """relu(W x) + eps, (B, T, H, F): the generalised kernel of section 2.2; 0 at masked tokens."""
    f = F.relu(products(x_BTHD, features)) + eps
    return f if mask is None else f.masked_fill(~mask[:, :, None, None], 0)


def heads_as_rows(x_BTHD: Tensor) -> Tensor:
    """(B H, T, 1, D): what matrix products over T want, of the values and of their gradients."""
    return x_BTHD.transpose(1, 2).flatten(0, 1)[:, :, None]


def summed(qf: Tensor, kf: Tensor, v_NT1D: Tensor) -> Tensor:
    """y (N, T, D) from the features of queries and keys (N, T, 1, F), every token seeing every other."""
    S = kf.squeeze(2).mT @ with_ones(v_NT1D).squeeze(2)
    return divided(qf.squeeze(2) @ S)


def with_ones(v_BTHD: Tensor) -> Tensor:
    """v with one more column, whose sums are the denominators."""
    return F.pad(v_BTHD, (0, 1), value=1.0)


def divided(o: Tensor) -> Tensor:
    """Numerators by denominators, which are 0 only where no token is real."""
    below = o[..., -1:]
    return o[..., :-1] / (below + (below == 0))
