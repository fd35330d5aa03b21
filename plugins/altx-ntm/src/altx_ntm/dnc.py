"""The Differentiable Neural Computer's memory (Graves et al. 2016, doi:10.1038/nature20101)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.memory import Memory
from altx.spec import BuildContext
from altx.state import Leaf
from altx_ntm.config import DNCConfig, dnc_capabilities
from altx_ntm.kernels.dnc import SCAN
from altx_ntm.kernels.dnc.reference import Reads, Slots, Writes
from altx_ntm.loop import LoopMemory

SPEC = {
    "memory": Leaf(kind="memory", fp32=True),
    "link": Leaf(kind="memory", fp32=True),
    "precedence": Leaf(kind="address", fp32=True),
    "usage": Leaf(kind="stat", fp32=True),
    "read_address": Leaf(kind="address", fp32=True),
    "write_address": Leaf(kind="address", fp32=True),
}


class DNC(LoopMemory):
    """N slots of width W, one head that writes to free or to similar ones, and R heads that read.

    A read head finds slots by content, or goes on to the one that was written after (or before) the one it read last.

    Args:
        config: sizes.
        dim: model width D.

    Shape: x (B, T, D) to a read value (B, T, D). State: memory (B, N, W), link (B, N, N), precedence, usage and
    write_address (B, N), read_address (B, R, N), in at least float32; all zeros before the first token.
    """

    OP = SCAN
    SLOTS = Slots
    LEAVES = SPEC

    def __init__(self, config: DNCConfig, dim: int) -> None:
        super().__init__(config.clip)
        self.config = config
        self.capabilities = dnc_capabilities(config)
        heads, width = config.read_heads, config.width
        self.read_heads = nn.Linear(dim, heads * (width + 4))
        self.write_head = nn.Linear(dim, 3 * width + 3 + heads)
        self.out_proj = nn.Linear(heads * width, dim)
        for linear in (self.read_heads, self.write_head, self.out_proj):
            # As the authors' code.
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> Slots:
        slots, width, heads = self.config.slots, self.config.width, self.config.read_heads
        shapes = ((slots, width), (slots, slots), (slots,), (slots,), (heads, slots), (slots,))
        return Slots(*(torch.zeros(batch, *shape, device=device, dtype=dtype) for shape in shapes))

    def looking(self, x: Tensor, dtype: torch.dtype) -> Reads:
        heads = self.clipped(self.read_heads, x, dtype).unflatten(-1, (self.config.read_heads, -1))
        key, strength, modes = heads.split([self.config.width, 1, 3], -1)
        return Reads(key, _one_plus(strength), torch.softmax(modes, -1))

    def writing(self, x: Tensor, dtype: torch.dtype) -> Writes:
        width, heads = self.config.width, self.config.read_heads
        outputs = self.clipped(self.write_head, x, dtype)
        key, strength, erase, add, gates = outputs.split([width, 1, width, width, heads + 2], -1)
        free, allocate, gate = torch.sigmoid(gates).split([heads, 1, 1], -1)
        return Writes(key, _one_plus(strength), torch.sigmoid(erase), add, free, allocate, gate)


def _one_plus(x: Tensor) -> Tensor:
    """The paper's oneplus: 1 + log(1 + e^x), from 1 to infinity."""
    return 1 + F.softplus(x)


def build(config: DNCConfig, ctx: BuildContext) -> Memory:
    return DNC(config, ctx.dim)
