"""What `mamba3-step` may be called with."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import KernelError
from altx_mamba.kernels import one_token


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
    **_: object,
) -> None:
    """Raises KernelError if the shapes do not fit together. Letters as in `reference`."""

    def shapes() -> dict[str, tuple[Tensor | None, one_token.Shape]]:
        if h.dim() != 4 or angle.dim() != 3:
            raise KernelError(
                f"op 'mamba3-step': h has shape {tuple(h.shape)}, angle {tuple(angle.shape)}",
                hint="they have four and three dimensions",
            )
        (B, M), (_, H, N, P), R = x.shape, h.shape, angle.shape[2]
        E, I = H * P, len(in_weight)
        # The groups follow from the rows of the projection that are left for B and C.
        shared = I - 2 * E - 3 * H - R
        if N == 0 or shared <= 0 or shared % (2 * N) or H % (shared // (2 * N)) or 2 * R > N:
            raise KernelError(
                f"op 'mamba3-step': a projection to {I} does not fit {H} heads of {P} x {N} and {R} angles",
                hint="it has 2 H P + 2 G N + 3 H + R rows, H is a multiple of G, and 2 R is at most N",
            )
        return {
            "h": (h, (B, H, N, P)), "angle": (angle, (B, H, R)), "k": (k, (B, H, N)), "v": (v, (B, H, P)),
            "in_weight": (in_weight, (I, M)), "dt_bias": (dt_bias, (H,)), "B_weight": (B_weight, (N,)),
            "C_weight": (C_weight, (N,)), "B_bias": (B_bias, (H, N)), "C_bias": (C_bias, (H, N)), "D": (D, (H,)),
            "norm_weight": (norm_weight, (E,)), "out_weight": (out_weight, (M, E)),
        }  # fmt: skip

    one_token.check("mamba3-step", {"x": x, "in_weight": in_weight}, shapes)
