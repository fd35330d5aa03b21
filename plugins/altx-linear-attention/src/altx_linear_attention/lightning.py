"""Lightning attention (Qin et al. 2024, arXiv:2401.04658), as in MiniMax-Text-01 (arXiv:2501.08313).

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
from altx_linear_attention.lightning_config import LightningConfig
from altx_linear_attention.norms import GatedNorm
from altx_linear_attention.recurrent import Recurrent, real


class Lightning(Recurrent):
    """Linear attention whose heads forget at fixed rates, the slower the later the block.

        [q | k | v]_h = silu(W_qkv x),    S_t = exp(-s) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t
        s = 2^(-8 (h + 1) / H) (1 - layer / (L - 1 + 1e-5) + 1e-5),    y_t = W_o (norm(o_t) * sigmoid(W_g x_t))

    with one norm over all heads. Parameters have the names and shapes of MiniMax-Text-01; its buffers, which are on
    disk there, are computed here.

    Args:
        dim: D.
        heads: H.
        width: K.
        layer, layers: this block's index, and L.
        norm_eps: epsilon of the norm.
    """

    def __init__(self, dim: int, *, heads: int, width: int, layer: int, layers: int, norm_eps: float) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        share = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        self.slopes = [2 ** (-8 * (head + 1) / heads) * share for head in range(heads)]
        self.qkv_proj = nn.Linear(dim, 3 * heads * width, bias=False)
        self.out_proj = nn.Linear(heads * width, dim, bias=False)
        self.output_gate = nn.Linear(dim, heads * width, bias=False)
        self.norm = GatedNorm(heads * width, eps=norm_eps, gate="sigmoid")
        for linear in (self.qkv_proj, self.out_proj, self.output_gate):
            nn.init.normal_(linear.weight, std=0.02)

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        return {"kv": ((self.heads, self.width, self.width), Leaf(fp32=True))}

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.x  # zero at masked tokens, and so are silu(W_qkv x)
        q, k, v = F.silu(self.qkv_proj(x)).unflatten(-1, (self.heads, -1)).chunk(3, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        g = torch.tensor(self.slopes, dtype=wide, device=x.device).neg().expand(*x.shape[:2], -1)
        o, kv = linear_recurrence(
            q, k, v, real(g, batch), initial_state=state["kv"] if state else None, reset=batch.reset
        )
        y: Tensor = self.out_proj(self.norm(o.flatten(2)[:, :, None], self.output_gate(x)))
        return y, {"kv": kv}


def build(config: LightningConfig, ctx: BuildContext) -> Lightning:
    return Lightning(
        ctx.dim,
        heads=config.count(ctx.dim),
        width=config.width(ctx.dim),
        layer=ctx.layer,
        layers=ctx.num_layers,
        norm_eps=config.norm_eps,
    )
