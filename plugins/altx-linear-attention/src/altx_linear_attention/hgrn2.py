"""HGRN2 (Qin et al. 2024, arXiv:2404.07904).

B rows, T tokens, D model width, H heads of width K, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_kernels.linear_recurrence import linear_recurrence
from altx_linear_attention.hgrn2_config import HGRN2Config
from altx_linear_attention.norms import GatedNorm
from altx_linear_attention.recurrent import Recurrent, real
from altx_linear_attention.short_conv import ShortConv


class HGRN2(Recurrent):
    """A gated linear recurrence with matrix states, whose key is what the forget gate leaves open: equation 6.

        f_t = b + (1 - b) sigmoid(W_f x_t),    S_t = diag(f_t) S_{t-1} + (1 - f_t) (W_i x_t)^T
        y_t = W_o norm(S_t^T silu(W_q x_t) / sqrt(K)), in heads, with one norm over all of them

    Block l's lower bound b is the sum of l of the L rows of softmax(lower_bounds), over rows, from the second one on:
    0 in the first block, and rising (Qin et al. 2023, HGRN, arXiv:2311.04823, section 3.2). In the authors' code all
    blocks share one parameter, which is so far each block's own here: it starts the same, and a checkpoint's goes into
    every block. Parameters have the names and shapes of fla's `HGRN2Attention`.

    Args:
        dim: D.
        heads: H.
        layer, layers: this block's index l, and L; None as l is no lower bound.
        conv_kernel: taps of the short convolutions, or None for none.
        conv_bias: whether these have biases.
        norm_eps: epsilon of the norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        layer: int,
        layers: int,
        lower_bound: bool,
        conv_kernel: int | None,
        conv_bias: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.layer = heads, layer
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.f_proj = nn.Linear(dim, dim, bias=False)
        self.i_proj = nn.Linear(dim, dim, bias=False)
        self.q_conv1d, self.f_conv1d, self.i_conv1d = (
            ShortConv(dim, conv_kernel, bias=conv_bias, activation=False) if conv_kernel else None for _ in range(3)
        )
        # The first block's bound is 0 whatever the parameter.
        self.lower_bounds = nn.Parameter(torch.zeros(layers, dim)) if lower_bound and layer else None
        self.g_norm = GatedNorm(dim, eps=norm_eps)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        for linear in (self.q_proj, self.f_proj, self.i_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        width = self.q_proj.out_features // self.heads
        return {"kv": ((self.heads, width, width), Leaf(fp32=True))}

    def param_groups(self) -> dict[str, dict[str, float]]:
        return {} if self.lower_bounds is None else {"lower_bounds": {"weight_decay": 0.0}}

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        after: dict[str, Tensor] = {}
        q, f, i = (
            self.convolve(f"{name}_conv1d", project(batch.x), batch, state, after)
            for name, project in (("q", self.q_proj), ("f", self.f_proj), ("i", self.i_proj))
        )
        k, g = self._gates(f)
        q, k, i, g = (part.unflatten(-1, (self.heads, -1)) for part in (F.silu(q), k.to(i.dtype), i, g))
        q = q * q.shape[-1] ** -0.5
        o, after["kv"] = linear_recurrence(
            q, real(k, batch), i, real(g, batch), initial_state=state["kv"] if state else None, reset=batch.reset
        )
        y: Tensor = self.o_proj(self.g_norm(o.flatten(2)[:, :, None]))
        return y, after

    def _gates(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """1 - f and log f (B, T, D), in float32 at least, from the projection of the forget gate."""
        wide = torch.promote_types(f.dtype, torch.float32)
        f = f.to(wide)
        opened = torch.sigmoid(-f)
        if self.lower_bounds is None:
            return opened, F.logsigmoid(f)
        bound = self.lower_bounds.to(wide).softmax(0)[1 : self.layer + 1].sum(0)
        return (1 - bound) * opened, torch.log(bound + (1 - bound) * torch.sigmoid(f))


def build(config: HGRN2Config, ctx: BuildContext) -> HGRN2:
    return HGRN2(
        ctx.dim,
        heads=config.heads(ctx.dim),
        layer=ctx.layer,
        layers=ctx.num_layers,
        lower_bound=config.lower_bound,
        conv_kernel=config.conv_kernel if config.short_conv else None,
        conv_bias=config.conv_bias,
        norm_eps=config.norm_eps,
    )
