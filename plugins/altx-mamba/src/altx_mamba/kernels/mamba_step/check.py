"""What `mamba-step` may be called with."""

from __future__ import annotations

from torch import Tensor

from altx_mamba.kernels import one_token

NAMES = (
    "past", "h", "in_weight", "in_bias", "conv_weight", "conv_bias", "x_weight", "dt_weight", "dt_bias", "D",
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
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    pre_weight: Tensor | None = None,
    seen: Tensor | None = None,
    **options: object,
) -> None:
    """Raises KernelError if the shapes do not fit together. Letters as in `reference`."""

    try:
        (B, _, M), (E, N), (_, _, K), (_, R) = x.shape, A_log.shape, conv_weight.shape, dt_weight.shape
    except ValueError:
        matrices = {"x": (x, 3), "A_log": (A_log, 2), "conv_weight": (conv_weight, 3), "dt_weight": (dt_weight, 2)}
        raise one_token.wrong_axes("mamba-step", **matrices) from None
    one_token.check(
        "mamba-step", NAMES, (past, (B, K - 1, E)), (h, (B, E, N)), (in_weight, (2 * E, M)), (in_bias, (2 * E,)),
        (conv_weight, (E, 1, K)), (conv_bias, (E,)), (x_weight, (R + 2 * N, E)), (dt_weight, (E, R)), (dt_bias, (E,)),
        (D, (E,)), (out_weight, (M, E)), (out_bias, (M,)), (pre_weight, (M,)), (x, (B, 1, M)), (seen, (B,)),
    )  # fmt: skip
    one_token.check_counts("mamba-step", seen)
