"""What RWKV-5, RWKV-6 and RWKV-7 have in common: heads with a matrix each, and a norm of each head's output.

B rows, T tokens, D model width, H heads of K = D / H channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.masking import RealFirst
from altx.state import Leaf, State
from altx_kernels.linear_recurrence import linear_recurrence
from altx_rwkv.initial import Depth, head_norm, orthogonal
from altx_rwkv.recurrent import Recurrent, real


class MatrixState(Recurrent):
    """Projections that all of them have, and a state of H matrices, K x K.

    Args:
        dim: D.
        heads: H.
        norm_eps: epsilon of the norm of each head's output.
        place: where the block stands, which the first weights depend on.
    """

    def __init__(self, dim: int, *, heads: int, norm_eps: float, place: Depth) -> None:
        super().__init__()
        self.heads = heads
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.ln_x = head_norm(heads, dim, norm_eps, place.share)
        for layer, scale in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0)):
            orthogonal(layer.weight, scale)
        nn.init.zeros_(self.output.weight)

    @property
    def dim(self) -> int:
        return self.key.in_features

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        width = self.dim // self.heads
        return {"kv": ((self.heads, width, width), Leaf(fp32=True))}

    def split(self, x: Tensor) -> Tensor:
        """(B, T, D) as heads (B, T, H, K)."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads

    def norm(self, y: Tensor) -> Tensor:
        """Each head of y (B, T, H, K) normed: (B, T, D)."""
        normed: Tensor = self.ln_x(y.flatten(2).flatten(0, 1)).unflatten(0, y.shape[:2])
        return normed


def read_before(
    r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, batch: RealFirst, state: State | None
) -> tuple[Tensor, Tensor]:
    """A linear recurrence that is read before it takes the token in, the token itself counting u times.

        y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T

    What the op reads at a token is read with the next token's r instead, and moved on by one.

    Args:
        r, k, v: (B, T, H, K).
        g: (B, T, H, K), <= 0.
        u: (H, K).
        batch: what goes with the tokens.
        state: with a leaf `kv` (B, H, K, K).

    Returns:
        y (B, T, H, K), and the last S (B, H, K, K).
    """
    k, g = real(k, batch), real(g, batch)
    following = F.pad(r[:, 1:], (0, 0, 0, 0, 0, 1))
    if batch.reset is not None:
        following = following.masked_fill(F.pad(batch.reset[:, 1:], (0, 1))[..., None, None], 0)
    start = state["kv"] if state else None
    read, last = linear_recurrence(following, k, v, g, initial_state=start, reset=batch.reset)
    if start is None:
        first = torch.zeros_like(v[:, :1])
    else:
        first = (r[:, :1, :, None].to(start.dtype) @ start[:, None])[..., 0, :].to(v.dtype)
        if batch.reset is not None:
            first = first.masked_fill(batch.reset[:, :1, None, None], 0)
    own = torch.einsum("bthk,hk->bth", r * k, u.to(r.dtype))[..., None]
    return torch.addcmul(torch.cat([first, read[:, :-1]], 1), own, v), last
