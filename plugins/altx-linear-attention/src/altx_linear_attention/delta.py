"""What the mixers with a delta rule share: projections, short convolutions, the rule, the norm of what it reads.

B rows, T tokens, D model width, H key heads of width K, G value heads for each of them, of width V.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.masking import RealFirst
from altx.state import Leaf, State
from altx_kernels.delta_rule import delta_rule
from altx_linear_attention.norms import GatedNorm, l2_norm
from altx_linear_attention.recurrent import Recurrent, real
from altx_linear_attention.short_conv import CONV, ShortConv

NAMES = ("q", "k", "v")


class DeltaMixer(Recurrent):
    """q, k and v of short convolutions, a matrix per value head that the delta rule writes, and a gated norm.

    A subclass adds a decay (`decay`) and a gate (`gate`) if it has them, and calls `initialise`.

    Args:
        dim: D.
        heads: H.
        head_dim: K.
        value_heads: G H.
        value_dim: V.
        conv_kernel: taps of the convolutions; 0 is none, which leaves silu alone.
        conv_bias: whether they have biases.
        allow_neg_eigval: whether beta is up to 2 instead of 1 (Grazzi et al. 2024, arXiv:2411.12537).
        norm: of each head's output.
        qk_silu: whether silu follows the convolutions of q and k, as it does that of v.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        value_heads: int,
        value_dim: int,
        conv_kernel: int,
        conv_bias: bool,
        allow_neg_eigval: bool,
        norm: GatedNorm,
        qk_silu: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim, self.value_dim, self.value_heads = head_dim, value_dim, value_heads
        self.most = 2.0 if allow_neg_eigval else 1.0
        keys, values = heads * head_dim, value_heads * value_dim
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.b_proj = nn.Linear(dim, value_heads, bias=False)
        if conv_kernel:
            self.q_conv1d = ShortConv(keys, conv_kernel, bias=conv_bias, activation=qk_silu)
            self.k_conv1d = ShortConv(keys, conv_kernel, bias=conv_bias, activation=qk_silu)
            self.v_conv1d = ShortConv(values, conv_kernel, bias=conv_bias)
        self.conv_kernel, self.qk_silu = conv_kernel, qk_silu
        self.o_norm = norm
        self.o_proj = nn.Linear(values, dim, bias=False)

    def decay(self, x: Tensor) -> Tensor | None:
        """Log decay of each token of x (B, T, D), in float32 or more: (B, T, G H), or (B, T, G H, K), or None."""
        return None

    def gate(self, x: Tensor) -> Tensor | None:
        """What o_norm makes its gate of, (B, T, G H V), or None."""
        return None

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The queries, scaled, and the keys that enter the rule, from those (B, T, H, K) of the convolutions."""
        return l2_norm(q, scale=self.head_dim**-0.5), l2_norm(k)

    def leaves(self) -> Mapping[str, tuple[tuple[int, ...], Leaf]]:
        taps, matrix = self.conv_kernel - 1, (self.value_heads, self.head_dim, self.value_dim)
        convs = {f"{n}_conv1d": ((taps, getattr(self, f"{n}_proj").out_features), CONV) for n in NAMES}
        return {**(convs if self.conv_kernel else {}), "delta": (matrix, Leaf(fp32=True))}

    def mix(self, batch: RealFirst, ctx: Context, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.x
        after: dict[str, Tensor] = {}
        projected = []
        for name in NAMES:
            z = getattr(self, f"{name}_proj")(x)
            if self.conv_kernel:
                conv = f"{name}_conv1d"
                z, after[conv] = getattr(self, conv)(z, batch, state[conv] if state else None)
            elif name == "v" or self.qk_silu:
                z = F.silu(z)
            projected.append(z)
        q, k = self.features(*(z.unflatten(-1, (-1, self.head_dim)) for z in projected[:2]))
        v = projected[2].unflatten(-1, (-1, self.value_dim))
        wide = torch.promote_types(x.dtype, torch.float32)
        beta = real(self.b_proj(x).to(wide).sigmoid() * self.most, batch)  # 0 writes nothing
        g = self.decay(x)
        o, after["delta"] = gated_delta_rule(
            q, k, v, beta, None if g is None else real(g, batch),
            initial_state=state["delta"] if state else None, reset=batch.reset,
        )  # fmt: skip
        return self.o_proj(self.o_norm(o, self.gate(x))), after


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    *, initial_state: Tensor | None, reset: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The delta rule S_t = (1 - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T, o_t = q_t S_t.

    Args:
        q, k: (B, T, H, K).
        v: (B, T, G H, V): value heads i G to (i + 1) G - 1 belong to key head i.
        beta: (B, T, G H).
        g: log decay, (B, T, G H) or (B, T, G H, K); None is no decay.
        initial_state: (B, G H, K, V).
        reset: (B, T) bool.

    Returns:
        o (B, T, G H, V) and the last S.
    """
    group = v.shape[2] // k.shape[2]
    if group > 1:
        q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    written = k * beta[..., None]
    read = -k if g is None else k * -(g if g.dim() == 4 else g[..., None]).exp()
    # beta k v^T - beta k (alpha k)^T S: the key that writes is one for both, and the sign goes with what reads.
    return delta_rule(q, written, v, written, read, g, initial_state=initial_state, reset=reset)


@torch.no_grad()
def initialise(mixer: nn.Module) -> None:
    """Start every linear map as the authors' code of DeltaNet and Gated DeltaNet does."""
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initial_A_log(heads: int, least: float) -> Tensor:
    """log A (heads,) with A uniform between `least` and 16; never -inf."""
    return torch.empty(heads).uniform_(least, 16).clamp(min=1e-4).log()


def initial_dt_bias(size: int) -> Tensor:
    """Biases (size,) whose softplus is log-uniform between 0.001 and 0.1, as in Mamba."""
    dt = torch.empty(size).uniform_(math.log(0.001), math.log(0.1)).exp()
    return dt + torch.log(-torch.expm1(-dt))


UNDECAYED: dict[str, dict[str, Any]] = {name: {"weight_decay": 0.0} for name in ("A_log", "dt_bias")}
"""Optimizer options of what makes a decay."""
