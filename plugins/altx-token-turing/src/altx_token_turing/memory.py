"""The Token Turing Machine (Ryoo et al. 2022, arXiv:2211.09119) as a memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.errors import UnsupportedContext
from altx.layer import FRESH, advanced
from altx.layout import append
from altx.memory import Memory, Read
from altx.segments import Piece, split
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_token_turing.config import TokenTuringConfig, capabilities
from altx_token_turing.unit import EPS, MLP, Unit

KEPT = Leaf(kind="memory", fp32=True)
SPEC = {"memory": KEPT, "output": KEPT, "open": Leaf(kind="memory"), "offset": Leaf(kind="counter")}


class TokenTuring(Memory):
    """Memory tokens M that every frame I of the sequence is read with, and then summarised into.

        O_s = process(learn_r([M_{s-1}; I_s])),    M_s = learn_m([M_{s-1}; I_s; O_s]),    M_0 = 0
        value_t = sum_i mix_i(x_t) O_i,    mix = sigmoid(mlp(norm(x_t)))

    O_s holds all of I_s. In an encoder a token is given that of its own frame; in a causal model that of the frame
    before, and 0 in the first, which has none.

    Args:
        config: sizes.
        dim: model width D.

    Shape: x (B, T, D) to a value (B, T, D). State: memory (B, m, D) and output (B, r, D) of the last finished frame, in
    at least float32; open (B, n, D), tokens of the open frame; offset (B,), how many.
    """

    def __init__(self, config: TokenTuringConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        self.unit = Unit(
            dim,
            memory=config.memory,
            process=config.process,
            layers=config.layers,
            heads=config.count(dim),
            hidden=int(config.expansion * dim),
            bottleneck=config.bottleneck,
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mix = MLP(dim, config.bottleneck, config.process)

    def param_groups(self) -> dict[str, dict[str, float]]:
        """Positions are embeddings: no decay."""
        return {"unit.position": {"weight_decay": 0.0}}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        config, like = self.config, self.unit.position
        counts = {"memory": config.memory, "output": config.process, "open": config.frame}
        shapes = {**{name: (count, like.shape[1]) for name, count in counts.items()}, "offset": ()}
        return State.zeros(batch, shapes, SPEC, like, device, dtype)

    def offset(self, state: State) -> list[int]:
        return state["offset"].tolist()

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Each token's mixture of the last frame's output; in an encoder of its own frame's, which q (B, T, D) is."""
        real = q if ctx.mask is None else q.masked_fill(~ctx.mask[..., None], 0)
        begun = None
        if ctx.reset is not None and q.shape[1]:
            begun = (ctx.reset if ctx.mask is None else ctx.reset & ctx.mask).cumsum(1) > 0
        if ctx.causal:
            output = state["output"]
        else:
            goes_on = state["offset"] > 0 if begun is None else (state["offset"] > 0) & ~begun[:, -1]
            if bool((goes_on & (ctx.lengths(q) > 0)).any()):
                raise UnsupportedContext(
                    "a frame that looks both ways is read whole, so it cannot go on with an open one",
                    hint="leave the state out, or use a causal context",
                )
            memory = state["memory"] if begun is None else state["memory"].masked_fill(begun[:, -1:, None], 0)
            output = self.unit.read(memory.to(q.dtype), real, ctx.mask)
        value: Tensor = torch.sigmoid(self.mix(self.norm(real))) @ output.to(q.dtype)
        if begun is not None and ctx.causal:
            value = value.masked_fill(begun[..., None], 0)
        return Read(value.to(q.dtype)), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Take a step when the last token of a frame has come."""
        seen = advanced(state.seen, u, ctx)
        for piece, part in split(u, ctx, self.offset(state), self.config.frame):
            state = self._held(part, state, piece)
        return state.replace(seen=seen), {}

    def _held(self, u: Tensor, state: State, piece: Piece) -> State:
        """The state after tokens u (B, n, D) of one frame of each row."""
        held = dict(state.leaves)
        if any(piece.reset):
            held = {name: x.masked_fill(_rows(piece.reset, x), 0) for name, x in held.items()}
        held["open"] = append(held["open"], u, held["offset"], piece.mask)
        held["offset"] = torch.tensor(piece.offset, device=u.device)
        if any(piece.last):
            memory, frame = held["memory"].to(u.dtype), held["open"].to(u.dtype)
            output = self.unit.read(memory, frame)
            new = {"memory": self.unit.write(memory, frame, output), "output": output}
            ended = _rows(piece.last, output)
            held |= {name: torch.where(ended, x.to(held[name].dtype), held[name]) for name, x in new.items()}
            held["open"] = held["open"].masked_fill(ended, 0)
        return state.replace(**held)


def _rows(chosen: list[bool], like: Tensor) -> Tensor:
    """Of each row whether it is chosen, to go with a tensor (B, ...)."""
    return torch.tensor(chosen, device=like.device).reshape(-1, *[1] * (like.dim() - 1))


def build(config: TokenTuringConfig, ctx: BuildContext) -> Memory:
    return TokenTuring(config, ctx.dim)
