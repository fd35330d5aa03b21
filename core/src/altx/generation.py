"""Generating tokens through the recurrent state: one prefill, then one token per call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from altx.capabilities import split_plan
from altx.config import LanguageModelHead
from altx.context import Context
from altx.errors import UnsupportedContext
from altx.model import Model
from altx.state import State


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row from logits (B, vocab): (B,) int64.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: consider only the k likeliest; 0 considers all.
        top_p: consider only the likeliest that together have this probability (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        # Keep a token while those before it have less than top_p, and always the first.
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        beyond[..., 0] = False
        ordered = ordered.masked_fill(beyond, float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def prefill(
    model: Model, tokens: Tensor, state: State, mask: Tensor | None = None, *, donate_state: bool = False
) -> tuple[Tensor, State]:
    """Feed a prompt (B, T), T >= 1, in pieces that the model accepts.

    Args:
        tokens: (B, T) int64.
        state: where to continue from.
        mask: (B, T) bool, True where the prompt is real.
        donate_state: as in `Context`.

    Returns:
        Logits (B, vocab) after each row's last position, and the advanced state.
    """
    seen = state.tokens
    offset = int(seen[0]) if seen is not None and len(seen) else 0
    start, last = 0, torch.empty(0)
    for length in split_plan(offset, tokens.shape[1], model.capabilities):
        piece = slice(start, start + length)
        ctx = Context(mask=None if mask is None else mask[:, piece], donate_state=donate_state)
        out = model(tokens[:, piece], ctx, state)
        assert out.state is not None
        state, last, start = out.state, out.y[:, -1], start + length
    return last, state


@torch.inference_mode()
def stream(
    model: Model,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue a prompt, token by token.

    Args:
        prompt: (B, T) int64, T >= 1; shorter prompts are padded at the left, with a mask.
        max_new_tokens: how many to draw.
        mask: (B, T) bool, True where the prompt is real.

    Yields:
        (B,) int64, one token per row.

    Raises:
        UnsupportedContext: if the model is not a causal language model, or cannot stream.
    """
    if not isinstance(model.config.head, LanguageModelHead) or not model.config.causal:
        raise UnsupportedContext("only a causal model with a language-model head can generate")
    if prompt.shape[1] < 1:
        raise UnsupportedContext("a prompt needs at least one token")
    if mask is not None and not bool(mask[:, -1].all()):
        raise UnsupportedContext("a prompt ends with a real token", hint="pad shorter prompts at the left")
    state = model.init_state(prompt.shape[0], capacity=prompt.shape[1] + max_new_tokens)
    logits, state = prefill(model, prompt, state, mask, donate_state=True)
    for index in range(max_new_tokens):
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield token
        if index + 1 < max_new_tokens:
            out = model(token[:, None], Context(donate_state=True), state)
            assert out.state is not None
            logits, state = out.y[:, -1], out.state
