"""The Neural Turing Machine's memory (Graves, Wayne & Danihelka 2014, arXiv:1410.5401)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH, advanced
from altx.memory import Memory, Read, Scan
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_ntm.config import NTMConfig, capabilities
from altx_ntm.kernels import SCAN
from altx_ntm.kernels.ntm.reference import Heads, Slots, Writes
from altx_ntm.tokens import real, resets

SPEC = {
    "memory": Leaf(kind="memory", fp32=True),
    "read_address": Leaf(kind="address", fp32=True),
    "write_address": Leaf(kind="address", fp32=True),
}


class NTM(Memory):
    """N slots of width W that heads address by content and by location.

    With the stability set of Collier & Beel 2018 (arXiv:1807.08518): a constant initial memory, learned initial
    addresses, clipped head outputs, tanh on keys and adds.

    Args:
        config: sizes and order.
        dim: model width D.

    Shape: x (B, T, D) to a read value (B, T, D). State: memory (B, N, W), read_address (B, R, N),
    write_address (B, H, N), in at least float32.
    """

    def __init__(self, config: NTMConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        self.write_first = config.order == "write-read"
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

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        start = self.read_start
        precise = torch.promote_types(dtype or start.dtype, torch.float32)
        fresh = self._fresh(batch, torch.device(device or start.device), precise)
        return State(fresh._asdict(), SPEC, seen=torch.zeros(batch, dtype=torch.int64, device=device or start.device))

    def _fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> Slots:
        """The slots before the first token."""
        config = self.config

        def rows(start: Tensor) -> Tensor:
            return torch.softmax(start.to(device, dtype), -1).repeat(batch, 1, 1)

        memory = torch.full((batch, config.slots, config.width), config.memory_init, device=device, dtype=dtype)
        return Slots(memory, rows(self.read_start), rows(self.write_start))

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read T times without writing; only the read addresses move.

        A reset starts from the initial memory and read addresses. In order "write-read" the token's write
        comes first and has already reset the memory, so the read leaves it.
        """
        slots, fresh = self._slots(state, ctx)
        fresh = fresh._replace(write_address=slots.write_address)
        if self.write_first:
            fresh = fresh._replace(memory=slots.memory)
        reads = self._reads(real(q, ctx), slots.memory.dtype)
        vectors, slots = SCAN(slots, fresh, reads, None, mask=ctx.mask, reset=resets(ctx))
        return self._value(vectors, q), state.replace(**slots._asdict())

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Write T times without reading.

        A reset starts from the initial memory and write addresses; the read addresses are the read's to reset.
        """
        slots, fresh = self._slots(state, ctx)
        fresh = fresh._replace(read_address=slots.read_address)
        writes = self._writes(real(u, ctx), slots.memory.dtype)
        _, slots = SCAN(slots, fresh, None, writes, mask=ctx.mask, reset=resets(ctx))
        return state.replace(seen=advanced(state.seen, u, ctx), **slots._asdict()), {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """Read and write token by token, in the config's order.

        Equal to a loop of `read` and `write`. The heads' parameters do not depend on the memory, so they
        come from one matrix product each for all tokens; only the addressing is sequential.
        """
        if not x.shape[1]:
            return Scan(self.read(x, state, ctx)[0], state)
        slots, fresh = self._slots(state, ctx)
        heard = real(x, ctx)
        reads, writes = self._reads(heard, slots.memory.dtype), self._writes(heard, slots.memory.dtype)
        vectors, slots = SCAN(
            slots, fresh, reads, writes, write_first=self.write_first, mask=ctx.mask, reset=resets(ctx)
        )
        state = state.replace(seen=advanced(state.seen, x, ctx), **slots._asdict())
        return Scan(self._value(vectors, x), state)

    def _slots(self, state: State, ctx: Context) -> tuple[Slots, Slots]:
        """The state's slots, and what a reset makes of them."""
        slots = Slots(**state.leaves)
        memory = slots.memory
        return slots, slots if ctx.reset is None else self._fresh(len(memory), memory.device, memory.dtype)

    def _reads(self, x: Tensor, dtype: torch.dtype) -> Heads:
        heads = self._clipped(self.read_heads, x, dtype).unflatten(-1, (self.config.read_heads, -1))
        return self._heads(heads)

    def _writes(self, x: Tensor, dtype: torch.dtype) -> Writes:
        width = self.config.width
        heads = self._clipped(self.write_heads, x, dtype).unflatten(-1, (self.config.write_heads, -1))
        erase, add, rest = heads.split([width, width, heads.shape[-1] - 2 * width], -1)
        return Writes(self._heads(rest), torch.sigmoid(erase), torch.tanh(add))

    def _clipped(self, linear: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
        outputs: Tensor = linear(x)
        return outputs.to(dtype).clamp(-self.config.clip, self.config.clip)

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

    def _value(self, vectors: Tensor, x: Tensor) -> Read:
        """What the heads read (B, T, R, W) as a value (B, T, D) of x's dtype."""
        return Read(self.out_proj(vectors.flatten(2).to(self.out_proj.weight.dtype)).to(x.dtype))


def build(config: NTMConfig, ctx: BuildContext) -> Memory:
    return NTM(config, ctx.dim)
