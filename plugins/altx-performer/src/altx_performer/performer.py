"""Performer: multi-head attention whose cost is linear in the sequence (Choromanski et al. 2020, arXiv:2009.14794).

B rows, T tokens, H heads, D width of a head, F features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, Layer, Output, StepInfo, advanced
from altx.masking import by_document, real_first
from altx.pieces import in_pieces
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_kernels.autocast import no_autocast
from altx_kernels.linear_recurrence import linear_recurrence
from altx_performer import favor
from altx_performer.config import PerformerConfig
from altx_performer.features import FeatureNorm, RandomFeatures
from altx_performer.kernels.positive_features import LOWEST

LEAVES = {"S": Leaf(fp32=True), "max": Leaf(fp32=True), "features": Leaf(kind="external", fp32=True)}


class Performer(Layer):
    """Multi-head attention through FAVOR+; see `altx_performer.favor` for the equations.

    Parameters have the names, shapes and initial distributions of `SelfAttention` in performer-pytorch.

    A state holds the features that it was made with, a copy for each row, and is continued with them: new features
    concern the sequences that start after they were drawn.

    Args:
        dim: model width.
        heads: H.
        head_dim: D.
        features: F.
        kernel: "softmax", or "relu" for relu(W x) + relu_eps in place of positive features.
        redraw_interval: optimizer steps from one draw of the features to the next; None for no other draw.
        feature_norm, seed, layer: see `altx_performer.features`.
        qkv_bias, out_bias: whether the projections have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        features: int,
        kernel: Literal["softmax", "relu"] = "softmax",
        redraw_interval: int | None = 1000,
        feature_norm: FeatureNorm = "gaussian",
        relu_eps: float = 1e-3,
        qkv_bias: bool = False,
        out_bias: bool = True,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.kernel, self.relu_eps = heads, head_dim, kernel, relu_eps
        self.redraw_interval = redraw_interval
        self.fast_attention = RandomFeatures(features, head_dim, norm=feature_norm, seed=seed, layer=layer)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    def on_step(self, info: StepInfo) -> None:
        if self.redraw_interval and info.step % self.redraw_interval == 0:
            self.fast_attention.redraw(info.step)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        features = self.fast_attention.projection_matrix
        device = device or features.device
        options: Any = {"device": device, "dtype": torch.promote_types(dtype or features.dtype, torch.float32)}
        count = features.shape[0]
        leaves = {
            "S": torch.zeros(batch, self.heads, count, self.head_dim + 1, **options),
            "max": torch.full((batch, self.heads, count), LOWEST, **options),
            "features": features.to(**options).repeat(batch, 1, 1),
        }
        if self.kernel == "relu":
            del leaves["max"]
        seen = torch.zeros(batch, device=device, dtype=torch.int64)
        return State(leaves, {name: LEAVES[name] for name in leaves}, seen=seen)

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if not ctx.causal:
            return self._both_ways(x, ctx, state)
        if not x.shape[1]:
            return Output(x, state)
        if out := in_pieces(self, x, ctx, state):
            return out
        batch = real_first(x, ctx)
        q, k, v = self._projected(batch.x)
        with no_autocast(x.device):
            features = state["features"] if state else self.fast_attention.projection_matrix
            S, M = (state["S"], state.leaves.get("max")) if state else (None, None)
            decay = None
            if self.kernel == "relu":
                qf, kf = (favor.relu_features(t, features, self.relu_eps, batch.mask) for t in (q, k))
            else:
                qf, kf, decay, M = favor.causal_features(q, k, features, M, batch.mask, batch.reset)
            o, S = linear_recurrence(qf, kf, favor.with_ones(v), decay, initial_state=S, reset=batch.reset)
            y = favor.divided(o)
        y = self._out(y, x)
        if state is not None:
            leaves = {"S": S} if M is None else {"S": S, "max": M}
            state = state.replace(**leaves, seen=advanced(state.seen, x, ctx))
        return Output(batch.restore(y), state)

    def _both_ways(self, x: Tensor, ctx: Context, state: State | None) -> Output:
        if state is not None:
            raise UnsupportedContext(
                "attention that looks both ways needs the whole sequence at once, so it cannot continue a state",
                hint="leave the state out, or use a causal context",
            )
        if not x.shape[1]:
            return Output(x)
        if ctx.reset is not None:
            rows = by_document(x, ctx)
            return Output(rows.restore(self(rows.x, Context(causal=False, mask=rows.mask)).y))
        mask = ctx.mask
        if mask is not None:
            # Whatever a masked token holds, NaN included, stays out of every sum.
            x = x.masked_fill(~mask[..., None], 0)
            mask = mask.repeat_interleave(self.heads, 0)
        q, k, v = map(favor.heads_as_rows, self._projected(x))
        with no_autocast(x.device):
            features = self.fast_attention.projection_matrix
            if self.kernel == "relu":
                qf, kf = (favor.relu_features(t, features, self.relu_eps, mask) for t in (q, k))
            else:
                qf, kf = favor.whole_features(q, k, features, mask)
            y = favor.summed(qf, kf, v).unflatten(0, (x.shape[0], self.heads)).transpose(1, 2)
        return Output(self._out(y, x))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, H, D), in float32 at least."""
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (t.to(wide).unflatten(-1, (self.heads, self.head_dim)) for t in (q, k, v))
        return q, k, v

    def _out(self, y_BTHD: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.to_out(y_BTHD.flatten(2).to(x.dtype))
        return y


def build(config: PerformerConfig, ctx: BuildContext) -> Performer:
    return Performer(
        ctx.dim,
        heads=config.heads,
        head_dim=config.width(ctx.dim),
        features=config.count(ctx.dim),
        kernel=config.kernel,
        redraw_interval=config.redraw_interval,
        feature_norm=config.feature_norm,
        relu_eps=config.relu_eps,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        seed=config.seed,
        layer=ctx.layer,
    )
