"""The ops of Mamba-1 as the paper writes them: one token at a time, in any dtype. The oracle of every backend.

Paper: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752.

    code            paper                   shape
    x               x, the SSM's input      (B, T, D)
    dt              Delta, after softplus   (B, T, D)
    A               A, negative             (D, N)
    B, C            B, C                    (B, T, N)
    D               D, the skip             (D,)
    h               h, the state            (B, D, N)

B rows, T tokens, D channels, N state size, K conv width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective scan: Algorithm 2, line 6, with equation 2.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = C_t h_t + D x_t

    As in the authors' code, A is discretised by zero-order hold (equation 4) and B by its first order,
    dt B. A token with dt = 0 leaves the state exactly as it was.

    Args:
        x, dt, A, B, C, D: as above.
        initial_state: (B, D, N), h before the first token; zero if None.
        reset: (B, T) bool; where it is true, h_{t-1} counts as zero.

    Returns:
        y (B, T, D) in the dtype of x, and the last h (B, D, N) in float32 or more.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    u, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    h = u.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        if reset is not None:
            decay = torch.where(reset[:, t, None, None], 0, decay)
        h = decay * h + dt[:, t, :, None] * B[:, t, None, :] * u[:, t, :, None]
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, 1) if ys else u
    if D is not None:
        y = y + D.to(dtype) * u
    return y.to(x.dtype), h


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """The short depthwise convolution in front of the scan (section 3.4): each channel by itself.

        y_t = bias + sum_j weight_j x_{t-K+1+j},    j = 0 .. K-1

    Args:
        x: (B, T, D).
        weight: (D, K), the current token's tap last.
        bias: (D,).
        initial_state: (B, K-1, D), the inputs before the first token; zero if None.
        reset: (B, T) bool; where it is true, every earlier input counts as zero from here on.

    Returns:
        y (B, T, D).
    """
    batch, length, dim = x.shape
    width = weight.shape[1]
    past = [x.new_zeros(batch, dim)] * (width - 1) if initial_state is None else list(initial_state.unbind(1))
    ys = []
    for t in range(length):
        if reset is not None:
            past = [torch.where(reset[:, t, None], 0, before) for before in past]
        window = [*past, x[:, t]]
        y = torch.zeros_like(x[:, t]) if bias is None else bias
        for j in range(width):
            y = y + weight[:, j] * window[j]
        ys.append(y)
        past = window[1:]
    return torch.stack(ys, 1) if ys else x
