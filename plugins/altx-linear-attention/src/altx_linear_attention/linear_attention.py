"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236).

B rows, T tokens, D model width, H heads of width K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Output
from altx.masking import RealFirst, real_first
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_kernels.autocast import no_autocast
from altx_kernels.linear_recurrence import linear_recurrence
from altx_linear_attention.config import LinearAttentionConfig
from altx_linear_attention.recurrent import Recurrent, real


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, equation 7."""
    return F.elu(x).add_(1)


def softmax(x: Tensor) -> Tensor:
    """Over a head's channels; the factor that it leaves out of exp(x) cancels in the normaliser."""
    return x.softmax(-1)


def exp(x: Tensor) -> Tensor:
    """In float32 at least: 16 bits would overflow beyond 11."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).exp()


FEATURES: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "elu": (elu, elu),
    "relu": (F.relu, F.relu),
    "exp": (softmax, exp),
}
"""phi of queries and of keys."""


class LinearAttention(Recurrent):
    """Attention with phi(q) . phi(k) in place of exp(q . k): equations 8 to 12 and 18 to 20.

        S_t = S_{t-1} + phi(k_t) v_t^T,    z_t = z_{t-1} + phi(k_t),    o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps)

    Without `ctx.causal` every token reads S and z of all tokens. Parameters have the names of the authors' code.

    Args:
        dim: D.
        heads: H.
        feature_map: a key of FEATURES.
        bias: biases on the projections of queries, keys and values.
        out_bias: a bias on the projection out.
        eps: see above.
    """

    def __init__(self, dim: int, *, heads: int, feature_map: str, bias: bool, out_bias: bool, eps: float) -> None:
        super().__init__()
        self.heads, self.feature_map, self.eps = heads, feature_map, eps
        self.query_projection = nn.Linear(dim, dim, bias=bias)
        self.key_projection = nn.Linear(dim, dim, bias=bias)
        self.value_projection = nn.Linear(dim, dim, bias=bias)
        self.out_projection = nn.Linear(dim, dim, bias=out_bias)

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        width = self.out_projection.in_features // self.heads
        return {"kv": ((self.heads, width, width + 1), Leaf(fp32=True))}

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if ctx.causal:
            return super().forward(x, ctx, state)
        if state is not None:
            raise UnsupportedContext(
                "linear attention that looks both ways needs the whole sequence at once, so it cannot continue a state",
                hint="leave the state out, or use a causal context",
            )
        if not x.shape[1]:
            return Output(x)
        batch = real_first(x, ctx)
        q, k, v = self._project(batch)
        return Output(batch.restore(self._read(_both_ways(q, k, v, batch.reset), q.dtype)))

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._project(batch)
        o, kv = linear_recurrence(q, k, v, initial_state=state["kv"] if state else None, reset=batch.reset)
        return self._read(o, q.dtype), {"kv": kv}

    def _project(self, batch: RealFirst) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k) (B, T, H, K) and v with a column of ones (B, T, H, K + 1), whose sum is z."""
        of_q, of_k = FEATURES[self.feature_map]
        q, k, v = (
            project(batch.x).unflatten(-1, (self.heads, -1))
            for project in (self.query_projection, self.key_projection, self.value_projection)
        )
        # In float32 at least, for 16 bits overflow when so much is added up.
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        return of_q(q), real(of_k(k), batch), F.pad(v, (0, 1), value=1.0)

    def _read(self, o: Tensor, dtype: torch.dtype) -> Tensor:
        """y (B, T, D) from numerator and normaliser (B, T, H, K + 1)."""
        o = o[..., :-1] / (o[..., -1:] + self.eps)
        y: Tensor = self.out_projection(o.flatten(2).to(dtype))
        return y


def _both_ways(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None) -> Tensor:
    """o_t = sum_s (q_t . k_s) v_s over all tokens s of t's sequence; q, k (B, T, H, K), v (B, T, H, V), wide."""
    if reset is None:
        with no_autocast(v.device):
            S = torch.einsum("bthk,bthv->bhkv", k.to(v.dtype), v)
            return torch.einsum("bthk,bhkv->bthv", q.to(v.dtype), S)
    before, _ = linear_recurrence(q, k, v, reset=reset)
    # The same backwards, in which a sequence ends where the next one starts; token t itself would count twice.
    first = torch.ones_like(reset[:, :1])
    ends = torch.cat([reset[:, 1:], first], 1).flip(1)
    after, _ = linear_recurrence(q.flip(1), k.flip(1), v.flip(1), reset=ends)
    return before + after.flip(1) - (q * k).sum(-1, keepdim=True, dtype=v.dtype) * v


def build(config: LinearAttentionConfig, ctx: BuildContext) -> LinearAttention:
    return LinearAttention(
        ctx.dim,
        heads=config.heads,
        feature_map=config.feature_map,
        bias=config.bias,
        out_bias=config.out_bias,
        eps=config.eps,
    )
