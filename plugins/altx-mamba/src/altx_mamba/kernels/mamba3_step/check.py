"""What `mamba3-step` may be called with."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import KernelError
from altx_mamba.kernels import one_token

NAMES = (
    "h", "angle", "k", "v", "in_weight", "dt_bias", "B_weight", "C_weight", "B_bias", "C_bias", "D", "norm_weight",
    "out_weight", "pre_weight", "x",
    "seen",
)  # fmt: skip


def check(
    x: Tensor,
    h: Tensor,
    angle: Tensor,
    k: Tensor,
    v: Tensor,
    in_weight: Tensor,
    dt_bias: Tensor,
    B_weight: Tensor,
    C_weight: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor,
    *,
    pre_weight: Tensor | None = None,
    seen: Tensor | None = None,
    **options: object,
) -> None:
    """Raises KernelError if the shapes do not fit together. Letters as in `reference`."""

    try:
        (B, _, M), (_, H, N, P), (_, _, R), (I, _) = x.shape, h.shape, angle.shape, in_weight.shape
    except ValueError:
        arguments = {"x": (x, 3), "h": (h, 4), "angle": (angle, 3), "in_weight": (in_weight, 2)}
        raise one_token.wrong_axes("mamba3-step", **arguments) from None
    E = H * P
    # The groups follow from the rows of the projection that are left for B and C.
    shared = I - 2 * E - 3 * H - R
    if N == 0 or shared <= 0 or shared % (2 * N) or H % (shared // (2 * N)) or 2 * R > N:
        raise KernelError(
            f"op 'mamba3-step': a projection to {I} does not fit {H} heads of {P} x {N} and {R} angles",
            hint="it has 2 H P + 2 G N + 3 H + R rows, H is a multiple of G, and 2 R is at most N",
        )
    one_token.check(
        "mamba3-step", NAMES, (h, (B, H, N, P)), (angle, (B, H, R)), (k, (B, H, N)), (v, (B, H, P)),
        (in_weight, (I, M)), (dt_bias, (H,)), (B_weight, (N,)), (C_weight, (N,)), (B_bias, (H, N)),
        (C_bias, (H, N)), (D, (H,)), (norm_weight, (E,)), (out_weight, (M, E)), (pre_weight, (M,)),
        (x, (B, 1, M)), (seen, (B,)),
    )  # fmt: skip
    one_token.check_counts("mamba3-step", seen)
