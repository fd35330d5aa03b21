"""The channel mixing of RWKV-4 to RWKV-7: a feed-forward that also sees the token before.

B rows, T tokens, D model width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from altx.masking import RealFirst
from altx.spec import BuildContext
from altx.state import State
from altx_rwkv.config import ChannelConfig, RWKV5ChannelConfig
from altx_rwkv.initial import Depth, channels, depth, orthogonal, per_channel
from altx_rwkv.pointwise import squared_relu, times
from altx_rwkv.recurrent import Recurrent, shifted


class ChannelMix(Recurrent):
    """RWKV-4 and RWKV-5 (Peng et al. 2023, arXiv:2305.13048, section 3.1, equations 18 to 20).

        k = W_k (m_k x_t + (1 - m_k) x_{t-1}),   r = W_r (m_r x_t + (1 - m_r) x_{t-1})
        y_t = sigmoid(r) * W_v relu(k)^2

    Parameters have the names and shapes of the authors' code, so their checkpoints fit.

    Args:
        dim: D.
        hidden: F.
        place: where the block stands, which the first weights depend on.
        widened: whether W_k starts larger the wider it is, as RWKV-4's does.
    """

    def __init__(self, dim: int, hidden: int, place: Depth, *, widened: bool = False) -> None:
        super().__init__()
        self.mixes(dim, place)
        self.key = nn.Linear(dim, hidden, bias=False)
        self.value = nn.Linear(hidden, dim, bias=False)
        if widened:
            orthogonal(self.key.weight)
        else:
            nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def mixes(self, dim: int, place: Depth) -> None:
        """Make the receptance, and how much of each token goes in."""
        self.receptance = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.receptance.weight)
        self.time_mix_k = per_channel(channels(dim) ** place.falling)
        self.time_mix_r = per_channel(channels(dim) ** place.falling)

    @property
    def dim(self) -> int:
        return self.key.in_features

    def mix(
        self, batch: RealFirst, shared: Mapping[str, Tensor], state: State | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        return self.gated(batch, 1 - torch.cat([self.time_mix_k, self.time_mix_r])[:, 0], state), {}, {}

    def gated(self, batch: RealFirst, mix: Tensor, state: State | None) -> Tensor:
        """y (B, T, D), mix (2, D) saying how much of the token before k and r see."""
        xk, xr = shifted(batch, mix, state)
        return times(torch.sigmoid(self.receptance(xr)), self.inner(xk))

    def inner(self, x: Tensor) -> Tensor:
        """W_v relu(W_k x)^2."""
        y: Tensor = self.value(squared_relu(self.key(x)))
        return y


class ChannelMix6(ChannelMix):
    """RWKV-6 (Peng et al. 2024, arXiv:2404.05892): as before, with 1 - m as the parameter, and other first weights."""

    def mixes(self, dim: int, place: Depth) -> None:
        self.receptance = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.receptance.weight)
        self.time_maa_k = per_channel(1 - channels(dim) ** place.falling**3)
        self.time_maa_r = per_channel(1 - channels(dim) ** place.falling**3)

    def mix(
        self, batch: RealFirst, shared: Mapping[str, Tensor], state: State | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        return self.gated(batch, torch.cat([self.time_maa_k, self.time_maa_r])[:, 0], state), {}, {}


class ChannelMix7(ChannelMix):
    """RWKV-7 (Peng et al. 2025, arXiv:2503.14456, section 4.2): without the receptance.

    y_t = W_v relu(W_k (x_t + x_k (x_{t-1} - x_t)))^2
    """

    def mixes(self, dim: int, place: Depth) -> None:
        self.x_k = per_channel(1 - channels(dim) ** place.falling**4)

    def mix(
        self, batch: RealFirst, shared: Mapping[str, Tensor], state: State | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        return self.inner(*shifted(batch, self.x_k[0], state)), {}, {}


def build4(config: ChannelConfig, ctx: BuildContext) -> ChannelMix:
    return ChannelMix(ctx.dim, config.width(ctx.dim), depth(ctx), widened=True)


def build5(config: RWKV5ChannelConfig, ctx: BuildContext) -> ChannelMix:
    return ChannelMix(ctx.dim, config.width(ctx.dim), depth(ctx))


def build6(config: RWKV5ChannelConfig, ctx: BuildContext) -> ChannelMix6:
    return ChannelMix6(ctx.dim, config.width(ctx.dim), depth(ctx))


def build7(config: ChannelConfig, ctx: BuildContext) -> ChannelMix7:
    return ChannelMix7(ctx.dim, config.width(ctx.dim), depth(ctx))
