"""What `mamba2-step` may be called with."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import KernelError
from altx_mamba.kernels import one_token

NAMES = (
    "past", "h", "in_weight", "in_bias", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight",
    "out_weight", "out_bias", "pre_weight", "x",
    "seen",
)  # fmt: skip


def check(
    x: Tensor,
    past: Tensor,
    h: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    pre_weight: Tensor | None = None,
    seen: Tensor | None = None,
    **options: object,
) -> None:
    """Raises KernelError if the shapes do not fit together. Letters as in `reference`."""

    try:
        (B, _, M), (_, H, N, P), (S, _, K) = x.shape, h.shape, conv_weight.shape
    except ValueError:
        raise one_token.wrong_axes("mamba2-step", x=(x, 3), h=(h, 4), conv_weight=(conv_weight, 3)) from None
    E = H * P
    # The groups follow from what the convolution is wider than the heads.
    if N == 0 or S <= E or (S - E) % (2 * N) or H % ((S - E) // (2 * N)):
        raise KernelError(
            f"op 'mamba2-step': a convolution of {S} channels does not fit {H} heads of {P} x {N}",
            hint="it has H P + 2 G N channels, and H is a multiple of G",
        )
    one_token.check(
        "mamba2-step", NAMES, (past, (B, K - 1, S)), (h, (B, H, N, P)), (in_weight, (E + S + H, M)),
        (in_bias, (E + S + H,)), (conv_weight, (S, 1, K)), (conv_bias, (S,)), (dt_bias, (H,)), (A_log, (H,)), (D, (H,)),
        (norm_weight, (E,)), (out_weight, (M, E)), (out_bias, (M,)), (pre_weight, (M,)), (x, (B, 1, M)), (seen, (B,)),
    )  # fmt: skip
    one_token.check_counts("mamba2-step", seen)
