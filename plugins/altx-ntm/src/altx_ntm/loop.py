"""What NTM and DNC have in common: heads' parameters for all tokens at once, and an op that is their time loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.layer import FRESH, advanced
from altx.memory import Memory, Read, Scan
from altx.state import Leaf, State
from altx_kernels import Op


class LoopMemory(Memory):
    """A memory of slots, all of whose state goes through one op, token by token.

    A subclass sets `out_proj`, and `capabilities` whose order its op follows.

    Args:
        clip: the largest number that a head's projection may say, either way.
        settings: further arguments of the op.

    Shape: x (B, T, D) to a read value (B, T, D). The state is in at least float32.
    """

    OP: ClassVar[Op[Any]]
    """op(slots, fresh, reads, writes, mask=, reset=): what was read (B, T, R, W), and the slots after."""
    SLOTS: ClassVar[type[Any]]
    """The named tuple of all that is carried from token to token, `memory` and `read_address` among it."""
    LEAVES: ClassVar[Mapping[str, Leaf]]

    out_proj: nn.Linear

    def __init__(self, clip: float, **settings: bool) -> None:
        super().__init__()
        self.clip = clip
        self.settings: dict[str, Any] = settings

    @abstractmethod
    def fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The slots before the first token."""

    @abstractmethod
    def looking(self, x: Tensor, dtype: torch.dtype) -> Any:
        """Parameters of the heads that read, of tokens x (B, T, D)."""

    @abstractmethod
    def writing(self, x: Tensor, dtype: torch.dtype) -> Any:
        """Parameters of the heads that write, of tokens x (B, T, D)."""

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
        slots = self.fresh(batch, place, torch.promote_types(dtype or like.dtype, torch.float32))
        return State(slots._asdict(), self.LEAVES, seen=torch.zeros(batch, dtype=torch.int64, device=place))

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read T times without writing; only the read addresses move.

        A reset starts from the initial read addresses, and from the initial memory unless the token's write comes
        first and has already reset all else.
        """
        slots, fresh = self._slots(state, ctx)
        fresh = slots._replace(
            read_address=fresh.read_address, memory=fresh.memory if self._reads_first else slots.memory
        )
        vectors, slots = self._run(slots, fresh, self.looking(_real(q, ctx), slots.memory.dtype), None, ctx)
        return self._value(vectors, q), state.replace(**slots._asdict())

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Write T times without reading.

        A reset starts afresh, but for read addresses that the token's read has already reset and moved.
        """
        slots, fresh = self._slots(state, ctx)
        if self._reads_first:
            fresh = fresh._replace(read_address=slots.read_address)
        _, slots = self._run(slots, fresh, None, self.writing(_real(u, ctx), slots.memory.dtype), ctx)
        return state.replace(seen=advanced(state.seen, u, ctx), **slots._asdict()), {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """Read and write token by token, in the capabilities' order.

        Equal to a loop of `read` and `write`. The heads' parameters do not depend on the memory, so they come from
        one matrix product each for all tokens; only the addressing is sequential.
        """
        if not x.shape[1]:
            return Scan(self.read(x, state, ctx)[0], state)
        slots, fresh = self._slots(state, ctx)
        heard, dtype = _real(x, ctx), slots.memory.dtype
        vectors, slots = self._run(slots, fresh, self.looking(heard, dtype), self.writing(heard, dtype), ctx)
        return Scan(self._value(vectors, x), state.replace(seen=advanced(state.seen, x, ctx), **slots._asdict()))

    @property
    def _reads_first(self) -> bool:
        return self.capabilities.order == "read-write"

    def _run(self, slots: Any, fresh: Any, reads: Any, writes: Any, ctx: Context) -> tuple[Tensor, Any]:
        """The op."""
        # Only the real tokens start afresh.
        reset = ctx.reset if ctx.reset is None or ctx.mask is None else ctx.reset & ctx.mask
        found: tuple[Tensor, Any] = self.OP(slots, fresh, reads, writes, mask=ctx.mask, reset=reset, **self.settings)
        return found

    def clipped(self, linear: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What a head's projection says, in the dtype of the loop."""
        outputs: Tensor = linear(x)
        return outputs.to(dtype).clamp(-self.clip, self.clip)

    def _slots(self, state: State, ctx: Context) -> tuple[Any, Any]:
        """The state's slots, and what a reset makes of them."""
        slots = self.SLOTS(**state.leaves)
        memory = slots.memory
        return slots, slots if ctx.reset is None else self.fresh(len(memory), memory.device, memory.dtype)

    def _value(self, vectors: Tensor, x: Tensor) -> Read:
        """What the heads read (B, T, R, W) as a value (B, T, D) of x's dtype."""
        return Read(self.out_proj(vectors.flatten(2).to(self.out_proj.weight.dtype)).to(x.dtype))


def _real(x: Tensor, ctx: Context) -> Tensor:
    """x with 0 at masked tokens, where it may hold anything, NaN included."""
    return x if ctx.mask is None else torch.where(ctx.mask[..., None], x, 0)
