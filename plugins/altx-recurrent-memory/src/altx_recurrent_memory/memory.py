"""The memory of the Recurrent Memory Transformer (Bulatov et al. 2022, arXiv:2207.06881)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altx.block import make_norm
from altx.context import Context
from altx.layer import FRESH
from altx.memory import Memory, Read
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_recurrent_memory.config import RecurrentMemoryConfig, capabilities

SPEC = {"memory": Leaf(kind="memory", fp32=True)}


class RecurrentMemory(Memory):
    """M tokens that stand before and after each segment; what the blocks make of the latter is the memory of the next.

    Args:
        config: sizes, what stands after a segment, and the norm.
        dim: model width D.

    State: memory (B, M, D), in at least float32. It counts no tokens: those around a segment are not the sequence's.
    """

    def __init__(self, config: RecurrentMemoryConfig, dim: int) -> None:
        super().__init__()
        self.capabilities = capabilities(config)
        # As an embedding's rows, which is what the official code makes them (modeling_rmt/language_modeling.py).
        shape = config.tokens, dim
        self.memory = nn.Parameter(torch.empty(shape))
        self.position = nn.Parameter(torch.empty(shape)) if config.position else None
        self.learned = config.write == "learned"
        self.write_tokens = nn.Parameter(torch.empty(shape)) if self.learned else None
        for tokens in self.parameters():
            nn.init.normal_(tokens, std=0.02)
        self.norm = make_norm(config.norm, dim, config.norm_eps)

    def param_groups(self) -> dict[str, dict[str, Any]]:
        """Tokens are embeddings: no decay."""
        return {name: {"weight_decay": 0.0} for name, _ in self.named_parameters(recurse=False)}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        precise = torch.promote_types(dtype or self.memory.dtype, torch.float32)
        memory = self.memory.to(device=device, dtype=precise)
        return State({"memory": memory.expand(batch, -1, -1)}, SPEC)

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """The tokens around a segment (equation 1). An encoder, which sees both ways, has them before it only."""
        memory = state["memory"]
        before = memory if self.position is None else memory + self.position.to(memory.dtype)
        after = memory if self.write_tokens is None else self.write_tokens.to(memory.dtype).expand_as(memory)
        return Read(tokens=before, after=after if ctx.causal or self.learned else None), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """What the blocks made of the memory's tokens u (B, M, D) is the new memory (equation 3)."""
        memory = state["memory"]
        new = self.norm(u).to(memory.dtype)
        return state.replace(memory=new if ctx.mask is None else torch.where(ctx.mask[..., None], new, memory)), {}


def build(config: RecurrentMemoryConfig, ctx: BuildContext) -> Memory:
    return RecurrentMemory(config, ctx.dim)
