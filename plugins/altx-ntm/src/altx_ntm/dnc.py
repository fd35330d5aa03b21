"""The Differentiable Neural Computer's memory (Graves et al. 2016, doi:10.1038/nature20101)."""

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
from altx_ntm.config import DNCConfig, dnc_capabilities
from altx_ntm.kernels.dnc import SCAN
from altx_ntm.kernels.dnc.reference import Reads, Slots, Writes
from altx_ntm.tokens import real, resets

SPEC = {
    "memory": Leaf(kind="memory", fp32=True),
    "link": Leaf(kind="memory", fp32=True),
    "precedence": Leaf(kind="address", fp32=True),
    "usage": Leaf(kind="stat", fp32=True),
    "read_address": Leaf(kind="address", fp32=True),
    "write_address": Leaf(kind="address", fp32=True),
}


class DNC(Memory):
    """N slots of width W, one head that writes to free or to similar ones, and R heads that read.

    A read head finds slots by content, or goes on to the one that was written after (or before) the one it read last.

    Args:
        config: sizes.
        dim: model width D.

    Shape: x (B, T, D) to a read value (B, T, D). State: memory (B, N, W), link (B, N, N), precedence, usage and
    write_address (B, N), read_address (B, R, N), in at least float32; all zeros before the first token.
    """

    def __init__(self, config: DNCConfig, dim: int) -> None:
        super().__init__()
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

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        like = self.out_proj.weight
        place = torch.device(device or like.device)
        fresh = self._fresh(batch, place, torch.promote_types(dtype or like.dtype, torch.float32))
        return State(fresh._asdict(), SPEC, seen=torch.zeros(batch, dtype=torch.int64, device=place))

    def _fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> Slots:
        """The slots before the first token."""
        slots, width, heads = self.config.slots, self.config.width, self.config.read_heads
        shapes = ((slots, width), (slots, slots), (slots,), (slots,), (heads, slots), (slots,))
        return Slots(*(torch.zeros(batch, *shape, device=device, dtype=dtype) for shape in shapes))

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read T times without writing; only the read addresses move, and only they are reset.

        The token's write comes first and has already reset the rest.
        """
        slots, fresh = self._slots(state, ctx)
        fresh = slots._replace(read_address=fresh.read_address)
        reads = self._reads(real(q, ctx), slots.memory.dtype)
        vectors, slots = SCAN(slots, fresh, reads, None, mask=ctx.mask, reset=resets(ctx))
        return self._value(vectors, q), state.replace(**slots._asdict())

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Write T times without reading. What the read heads read last may be freed."""
        slots, fresh = self._slots(state, ctx)
        writes = self._writes(real(u, ctx), slots.memory.dtype)
        _, slots = SCAN(slots, fresh, None, writes, mask=ctx.mask, reset=resets(ctx))
        return state.replace(seen=advanced(state.seen, u, ctx), **slots._asdict()), {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """Write and read token by token.

        Equal to a loop of `write` and `read`. The heads' parameters come from one matrix product each for all
        tokens; only the addressing is sequential.
        """
        if not x.shape[1]:
            return Scan(self.read(x, state, ctx)[0], state)
        slots, fresh = self._slots(state, ctx)
        heard, dtype = real(x, ctx), slots.memory.dtype
        vectors, slots = SCAN(
            slots, fresh, self._reads(heard, dtype), self._writes(heard, dtype), mask=ctx.mask, reset=resets(ctx)
        )
        return Scan(self._value(vectors, x), state.replace(seen=advanced(state.seen, x, ctx), **slots._asdict()))

    def _slots(self, state: State, ctx: Context) -> tuple[Slots, Slots]:
        """The state's slots, and what a reset makes of them."""
        slots = Slots(**state.leaves)
        memory = slots.memory
        return slots, slots if ctx.reset is None else self._fresh(len(memory), memory.device, memory.dtype)

    def _reads(self, x: Tensor, dtype: torch.dtype) -> Reads:
        heads = self._clipped(self.read_heads, x, dtype).unflatten(-1, (self.config.read_heads, -1))
        key, strength, modes = heads.split([self.config.width, 1, 3], -1)
        return Reads(key, _one_plus(strength), torch.softmax(modes, -1))

    def _writes(self, x: Tensor, dtype: torch.dtype) -> Writes:
        width, heads = self.config.width, self.config.read_heads
        outputs = self._clipped(self.write_head, x, dtype)
        key, strength, erase, add, gates = outputs.split([width, 1, width, width, heads + 2], -1)
        free, allocate, gate = torch.sigmoid(gates).split([heads, 1, 1], -1)
        return Writes(key, _one_plus(strength), torch.sigmoid(erase), add, free, allocate, gate)

    def _clipped(self, linear: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
        outputs: Tensor = linear(x)
        return outputs.to(dtype).clamp(-self.config.clip, self.config.clip)

    def _value(self, vectors: Tensor, x: Tensor) -> Read:
        """What the heads read (B, T, R, W) as a value (B, T, D) of x's dtype."""
        return Read(self.out_proj(vectors.flatten(2).to(self.out_proj.weight.dtype)).to(x.dtype))


def _one_plus(x: Tensor) -> Tensor:
    """The paper's oneplus: 1 + log(1 + e^x), from 1 to infinity."""
    return 1 + F.softplus(x)


def build(config: DNCConfig, ctx: BuildContext) -> Memory:
    return DNC(config, ctx.dim)
