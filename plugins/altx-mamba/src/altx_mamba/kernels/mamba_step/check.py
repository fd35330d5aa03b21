"""What `mamba-step` may be called with."""

from __future__ import annotations

from torch import Tensor

from altx_mamba.kernels import one_token


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
    **_: object,
) -> None:
    """Raises KernelError if the shapes do not fit together. Letters as in `reference`."""

    def shapes() -> dict[str, tuple[Tensor | None, one_token.Shape]]:
        (B, M), (E, N), K, R = x.shape, A_log.shape, conv_weight.shape[1], dt_weight.shape[1]
        return {
            "past": (past, (B, K - 1, E)), "h": (h, (B, E, N)),
            "in_weight": (in_weight, (2 * E, M)), "in_bias": (in_bias, (2 * E,)),
            "conv_weight": (conv_weight, (E, K)), "conv_bias": (conv_bias, (E,)),
            "x_weight": (x_weight, (R + 2 * N, E)), "dt_weight": (dt_weight, (E, R)), "dt_bias": (dt_bias, (E,)),
            "D": (D, (E,)), "out_weight": (out_weight, (M, E)), "out_bias": (out_bias, (M,)),
        }  # fmt: skip

    matrices = {"x": x, "A_log": A_log, "conv_weight": conv_weight, "dt_weight": dt_weight}
    one_token.check("mamba-step", matrices, shapes)
