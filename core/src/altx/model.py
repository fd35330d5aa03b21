"""A whole model: what comes in is turned into tokens of width D, passes the blocks, and meets a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.block import make_norm
from altx.config import ClassifierHead, LanguageModelHead, ModelConfig, TokensInput
from altx.context import Context
from altx.errors import BrokenPlugin, StateError, UnsupportedContext, culprit, describe, remedy
from altx.layer import FRESH, Component, Layer, Output, descendants, scoped
from altx.state import State


class Model(Component):
    """An input adapter, the blocks, a norm and a head.

    Args:
        config: the canonical config.
        body: the blocks.
    """

    def __init__(self, config: ModelConfig, body: Layer) -> None:
        super().__init__()
        self.config = config
        self.input: nn.Module = (
            nn.Embedding(config.input.vocab, config.dim)
            if isinstance(config.input, TokensInput)
            else nn.Linear(config.input.size, config.dim)
        )
        self.body = body
        self.norm = make_norm(config.final_norm, config.dim, config.norm_eps)
        self.head = self._make_head(config)
        self.capabilities = body.capabilities
        self._carrying: list[str] | None = None
        if isinstance(self.input, nn.Embedding):
            # A tied embedding is also the head: rows of length about 1 keep first logits near 0 (GPT-2).
            nn.init.normal_(self.input.weight, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.02)

    @staticmethod
    def _make_head(config: ModelConfig) -> nn.Module | None:
        head = config.head
        if isinstance(head, LanguageModelHead):
            assert isinstance(config.input, TokensInput)
            return None if head.tie else nn.Linear(config.dim, config.input.vocab, bias=False)
        return nn.Linear(config.dim, head.classes if isinstance(head, ClassifierHead) else head.size)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token; `capacity` reserves room for that many tokens.

        Raises:
            UnsupportedContext: if the model cannot stream.
            StateError: if there cannot be so many rows, or so much room.

        What a plugin's code raises goes through, with a note that names the plugin.
        """
        if self.capabilities.streaming == "none":
            raise UnsupportedContext("this model does not stream: some of its layers look at the whole sequence")
        if batch < 0 or (capacity or 0) < 0:
            what = f"{batch} rows" if batch < 0 else f"room for {capacity} tokens"
            raise StateError(f"there is no state with {what}", hint="pass 0 or more")
        weight = next(self.parameters())
        device, dtype = device or weight.device, dtype or weight.dtype
        try:
            return self.body.init_state(batch, capacity=capacity, device=device, dtype=dtype) or State()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if who := culprit(error):
                if not isinstance(error, Exception):
                    # Such as SystemExit, which would end the program without a word.
                    what = f"{who}: its init_state raised {describe(error)}"
                    raise BrokenPlugin(what, hint="tell its authors, or use another version") from error
                error.add_note(f"raised in {who}; {remedy(error, 'tell its authors, or use another version')}")
            raise

    def forward(self, inputs: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        """Run the model.

        Args:
            inputs: (B, T) int64 tokens, or (B, T, size) vectors.
            ctx: as for any layer; `causal` is the model's own.
            state: from `init_state` or an earlier call, to continue.

        Returns:
            y is (B, T, vocab), (B, T, size), or (B, classes).

        Raises:
            UnsupportedContext: if inputs or context are none, or ask for what some part cannot honour.
            StateError: if the state is of another model.
        """
        self._refuse(inputs, ctx, state)
        ctx = ctx.replace(causal=self.config.causal)
        if "token_ids" in self.capabilities.requires:
            ctx = ctx.replace(shared={**ctx.shared, "token_ids": inputs})
        try:
            x = self.input(inputs)
        except IndexError as error:
            found, tokens = f"{int(inputs.min())} to {int(inputs.max())}", len(self.tied_weight)
            raise UnsupportedContext(f"tokens are 0 to {tokens - 1}; the inputs hold {found}") from error
        try:
            out = self.body(x, ctx, state)
        except KeyError as error:
            if state is None or {*state.flat()} == {*self.init_state(0).flat()}:
                raise
            raise _foreign(f": it lacks {error}") from error
        x = self.norm(out.y)
        if isinstance(self.config.head, ClassifierHead):
            x = _pool(x, ctx.mask, self.config.head.pool)
        y = F.linear(x, self.tied_weight) if self.head is None else self.head(x)
        # As in init_state: a model that carries nothing still has a state, an empty one.
        advanced = out.state or (State() if state is not None else None)
        return Output(y, advanced, scoped("body", out.losses), scoped("body", out.metrics))

    @property
    def tied_weight(self) -> Tensor:
        """The embedding's weight, which a tied head shares."""
        assert isinstance(self.input, nn.Embedding)
        return self.input.weight

    def loss_weights(self) -> dict[str, float]:
        """Recommended weight of each auxiliary loss, by the name under which `forward` returns it."""
        return {
            f"{path}.{name}": weight
            for path, component in descendants(self)
            for name, weight in component.capabilities.losses.items()
        }

    def _refuse(self, inputs: Tensor, ctx: Context, state: State | None) -> None:
        """Say what is wrong with a call, or which part cannot honour it, rather than ignore it."""
        caps, rows, given = self.capabilities, inputs.shape[:2], self.config.input
        size = () if isinstance(given, TokensInput) else (given.size,)
        if len(rows) < 2 or inputs.shape[2:] != size or inputs.is_floating_point() != bool(size):
            wanted = f"(B, T, {size[0]}) vectors" if size else "(B, T) int64 tokens"
            raise UnsupportedContext(f"the inputs must be {wanted}; they are {_form(inputs)}")
        count = ctx.sequences(inputs)
        for name in ("mask", "reset", "positions"):
            value, dtype = getattr(ctx, name), torch.int64 if name == "positions" else torch.bool
            if value is not None and (value.shape != rows or value.dtype != dtype):
                wanted = f"{_form(value.new_empty(rows, dtype=dtype))}, as the inputs are"
                raise UnsupportedContext(f"ctx.{name} must be {wanted}; it is {_form(value)}")
        # Packed batches are unpacked for any layer that takes a mask.
        for name, flag in (("mask", "masked"), ("reset", "reset"), ("cu_seqlens", "masked"), ("cross", "cross")):
            if getattr(ctx, name) is not None and not getattr(caps, flag):
                raise UnsupportedContext(f"{self._culprits(flag, False)} cannot honour ctx.{name}")
        if ctx.cross is not None:
            shape, mask = ctx.cross.tokens.shape, ctx.cross.mask
            if shape != (count, *shape[1:2], self.config.dim):
                wanted = f"({count}, any number, {self.config.dim})"
                raise UnsupportedContext(f"ctx.cross.tokens must be {wanted}; they are {tuple(shape)}")
            if mask is not None and (mask.shape != shape[:2] or mask.dtype != torch.bool):
                raise UnsupportedContext(f"ctx.cross.mask must be {tuple(shape[:2])} bool; it is {_form(mask)}")
        if (ctx.graph is None and caps.graph == "required") or (ctx.graph is not None and caps.graph == "ignored"):
            what = "needs a ctx.graph" if ctx.graph is None else "has no use for a ctx.graph"
            raise UnsupportedContext(f"{self._culprits('graph', caps.graph)} {what}")
        if caps.max_len is not None:
            seen = state.tokens if state else None
            longest = inputs.shape[1]
            if ctx.cu_seqlens is not None and len(ctx.cu_seqlens) > 1:
                longest = int(ctx.cu_seqlens.diff().max())
            total = longest + (int(seen.max()) if seen is not None and len(seen) else 0)
            if total > caps.max_len:
                who = self._culprits("max_len", caps.max_len)
                raise UnsupportedContext(f"{total} tokens are more than the {caps.max_len} that {who} accepts")
        if ctx.cu_seqlens is not None and isinstance(self.config.head, ClassifierHead):
            raise UnsupportedContext(
                "a classifier head pools whole rows; give it a padded batch with a mask, not a packed one"
            )
        if state is None:
            return
        if caps.streaming == "none":
            raise UnsupportedContext("this model does not stream, so it cannot go on from a state")
        if state.tokens is not None and len(state.tokens) != count:
            raise UnsupportedContext(f"the state is of {len(state.tokens)} sequences, the inputs are of {count}")
        # That of a model with fewer layers would leave some without, and nobody would see it.
        if not torch.compiler.is_compiling():
            if self._carrying is None:
                self._carrying = _carrying(self.init_state(0))
            if _carrying(state) != self._carrying:
                raise _foreign()

    def _culprits(self, field: str, value: Any) -> str:
        """Paths of the innermost components whose capability has this value."""
        paths = [
            p for p, c in descendants(self) if getattr(c.capabilities, field) == value and not list(descendants(c))
        ]
        return ", ".join(paths) or "this model"


def _foreign(how: str = "") -> StateError:
    hint = "continue from what its init_state or an earlier call returned"
    return StateError(f"the state is not one of this model's{how}", hint=hint)


def _carrying(state: State) -> list[str]:
    """The blocks that have a state, and what inside them has."""
    return [*state.children, *(name for child in state.children.values() for name in child.children)]


def _form(value: Tensor) -> str:
    """Shape and dtype, such as (2, 3) bool."""
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _pool(x: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """(B, T, D) to (B, D), over real tokens. A row without any is 0."""
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    if how == "last":
        step = torch.arange(1, x.shape[1] + 1, device=x.device)
        real = (step * real) == (step * real).amax(1, keepdim=True).clamp(min=1)
    return torch.where(real[..., None], x, 0).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
