"""The Neural Turing Machine's memory (Graves, Wayne & Danihelka 2014, arXiv:1410.5401)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.memory import Memory
from altx.spec import BuildContext
from altx.state import Leaf
from altx_ntm.config import NTMConfig, capabilities
from altx_ntm.kernels import SCAN
from altx_ntm.kernels.ntm.reference import Heads, Slots, Writes
from altx_ntm.loop import LoopMemory

SPEC = {
    "memory": Leaf(kind="memory", fp32=True),
    "read_address": Leaf(kind="address", fp32=True),
    "write_address": Leaf(kind="address", fp32=True),
}


class NTM(LoopMemory):
    """N slots of width W that heads address by content and by location.

    With the stability set of Collier & Beel 2018 (arXiv:1807.08518): a constant initial memory, learned initial
    addresses, clipped head outputs, tanh on keys and adds.

    Args:
        config: sizes and order.
        dim: model width D.

    Shape: x (B, T, D) to a read value (B, T, D). State: memory (B, N, W), read_address (B, R, N),
    write_address (B, H, N), in at least float32.
    """

    OP = SCAN
    SLOTS = Slots
    LEAVES = SPEC

    def __init__(self, config: NTMConfig, dim: int) -> None:
        super().__init__(config.clip, write_first=config.order == "write-read")
        self.config = config
        self.capabilities = capabilities(config)
        looking = config.width + (2 * config.shift + 1) + 3
        self.read_heads = nn.Linear(dim, config.read_heads * looking)
        self.write_heads = nn.Linear(dim, config.write_heads * (looking + 2 * config.width))
        self.read_start = nn.Parameter(torch.empty(config.read_heads, config.slots))
        self.write_start = nn.Parameter(torch.empty(config.write_heads, config.slots))
        self.out_proj = nn.Linear(config.read_heads * config.width, dim)
        self._initialise()

    def _initialise(self) -> None:
        """As Collier & Beel: truncated normal over sqrt(fan in), Glorot for the learned initial addresses."""
        for linear in (self.read_heads, self.write_heads, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        for start in (self.read_start, self.write_start):
            # Not uniform addresses: slots that start alike would stay alike.
            bound = (6 / (1 + self.config.slots)) ** 0.5
            nn.init.uniform_(start, -bound, bound)

    def param_groups(self) -> dict[str, dict[str, float]]:
        """The initial addresses are biases of a softmax: no decay."""
        return {"read_start": {"weight_decay": 0.0}, "write_start": {"weight_decay": 0.0}}

    def fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> Slots:
        config = self.config

        def rows(start: Tensor) -> Tensor:
            return torch.softmax(start.to(device, dtype), -1).repeat(batch, 1, 1)

        memory = torch.full((batch, config.slots, config.width), config.memory_init, device=device, dtype=dtype)
        return Slots(memory, rows(self.read_start), rows(self.write_start))

    def looking(self, x: Tensor, dtype: torch.dtype) -> Heads:
        heads = self.clipped(self.read_heads, x, dtype).unflatten(-1, (self.config.read_heads, -1))
        return self._heads(heads)

    def writing(self, x: Tensor, dtype: torch.dtype) -> Writes:
        width = self.config.width
        heads = self.clipped(self.write_heads, x, dtype).unflatten(-1, (self.config.write_heads, -1))
        erase, add, rest = heads.split([width, width, heads.shape[-1] - 2 * width], -1)
        return Writes(self._heads(rest), torch.sigmoid(erase), torch.tanh(add))

    def _heads(self, h: Tensor) -> Heads:
        """Activations of the numbers (B, T, heads, W + 2r+1 + 3) that say where to look."""
        key, shift, strength, gate, sharpness = h.split([self.config.width, 2 * self.config.shift + 1, 1, 1, 1], -1)
        return Heads(
            torch.tanh(key),
            F.softplus(strength),
            torch.sigmoid(gate),
            torch.softmax(shift, -1),
            1 + F.softplus(sharpness),
        )


def build(config: NTMConfig, ctx: BuildContext) -> Memory:
    return NTM(config, ctx.dim)
